"""The bfloat16 lint: every operation that the interpreter gets wrong is reported where it stands, and moves are not.

The kernels run in a process of their own, because Triton's own functions are interpreted only if it was imported so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from kernbench.errors import KernbenchError
from kernbench.parity import bf16lint

ADVICE = "Triton's interpreter computes with their bits: cast with .to(tl.float32) first"
LOADED = "bfloat16 numbers as they were loaded"
# What is computed of a and b, bfloat16 [8], at positions i; what it should be in torch; what is reported, if anything.
EXPRESSIONS = {
    "add": ("a + b", "a + b", "adds"),
    "add a constant": ("a + 1.5", "a + 1.5", "adds"),
    "subtract": ("a - b", "a - b", "subtracts"),
    "multiply": ("a * b", "a * b", "multiplies"),
    "negate": ("-a", "-a", "negates|subtracts"),
    "less": ("a < b", "a < b", "compares"),
    "equal": ("a == a", "a == a", "compares"),
    "maximum": ("tl.maximum(a, b)", "torch.maximum(a, b)", "compares"),
    "clamp": ("tl.clamp(a, -1.0, 1.0)", "a.clamp(-1, 1)", "clamps"),
    "fma": ("tl.fma(a, b, a)", "(a.double() * b.double() + a.double())", "multiplies"),
    "sum": ("tl.sum(a, 0) + tl.zeros([8], tl.float32)", "a.double().nansum()", "reduces"),
    "argmax": ("tl.argmax(b, 0) + i * 0", "b.argmax()", "reduces"),
    "cumsum": ("tl.cumsum(a, 0)", "a.double().cumsum(0)", "scans"),
    "sort": ("tl.sort(a)", "a.sort()[0]", "compares"),
    "cast from float64": ("a.to(tl.float32).to(tl.float64).to(tl.bfloat16)", "a", "casts fp64 to bfloat16"),
    "cast from int": ("i.to(tl.bfloat16)", "torch.arange(8).bfloat16()", "casts int32 to bfloat16"),
    "move": ("a", "a", ""),
    "where": ("tl.where(i < 4, a, b)", "torch.where(torch.arange(8) < 4, a, b)", ""),
    "shape": ("tl.reshape(tl.trans(tl.reshape(a, [4, 2])), [8])", "a.reshape(4, 2).t().reshape(8)", ""),
    "join": ("tl.split(tl.join(a, b))[1]", "b", ""),
    "flip": ("tl.flip(a, 0)", "a.flip(0)", ""),
    "constant": ("tl.full([8], 1.5, tl.bfloat16)", "torch.full((8,), 1.5)", ""),
    "absolute": ("tl.abs(a)", "a.abs()", ""),
    "other": ("tl.load(x + i, mask=i < 4, other=1.5)", "torch.where(torch.arange(8) < 4, a, 1.5)", ""),
    "bits": ("a.to(tl.uint16, bitcast=True).to(tl.bfloat16, bitcast=True)", "a", ""),
    "to float32": ("a.to(tl.float32) * b.to(tl.float32)", "a.float() * b.float()", ""),
    "promoted": ("a * b.to(tl.float32)", "a.float() * b.float()", ""),
    "to float16": ("b.to(tl.float16)", "b.half()", ""),
    "to float64": ("a.to(tl.float64)", "a.double()", ""),
    "to int": ("b.to(tl.int32)", "b.int()", ""),
    "from float16": ("i.to(tl.float16).to(tl.bfloat16)", "torch.arange(8)", ""),
    "rounded": ("(a.to(tl.float32) + b.to(tl.float32)).to(tl.bfloat16)", "a + b", ""),
    "largest": ("tl.max(b, 0) + tl.zeros([8], tl.float32)", "b.float().max()", ""),
}
# tl.max casts to float32 itself; NaN is not equal to itself, and its bits are.
HEAD = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef _helper(value):\n    return value + value\n"
KERNEL = """
@triton.jit
def kernel_{index}(x, y, out):
    i = tl.arange(0, 8)
    a, b = tl.load(x + i), tl.load(y + i)
    result = {expression}
    tl.store(out + i, result)
"""
SHAPED = '''
@triton.jit(
    do_not_specialize=[],
)
def product(x, y, out):
    """A docstring

    of several lines.
    """
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    total = tl.dot(
        tl.load(x + at),
        tl.load(y + at),
    )
    tl.store(out + at, total)


@triton.jit
def through_a_helper(x, y, out):
    i = tl.arange(0, 8)
    value = tl.load(x + i)
    for _ in range(3):
        value = _helper(
            value
        )
    tl.store(out + i, value)


@triton.jit
def atomic(x, y, out):
    i = tl.arange(0, 8)
    tl.atomic_add(out + i, tl.load(x + i))
'''
CHILD = """
import importlib.util, json, sys
import torch
from kernbench import registry
from kernbench.parity import bf16lint
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

path, expressions = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("planted", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a = torch.tensor([1.0, -2.0, 3.5, 0.25, -7.0, 100.0, -3e-5, float("nan")], dtype=torch.bfloat16)
b = torch.tensor([2.0, 3.0, -1.5, 0.25, 7.0, -90.0, -2e-5, 9.0], dtype=torch.bfloat16)
def state():
    found = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    return [dict(vars(item)) for item in found]
before = state()
results = {}
for index, (name, (_, wanted)) in enumerate(expressions.items()):
    wanted = torch.as_tensor(eval(wanted)).expand(8)
    out = torch.zeros(8, dtype=wanted.dtype)
    with bf16lint.watching() as watch:
        try:
            getattr(module, f"kernel_{index}")[(1,)](a, b, out)
        except InterpreterError as error:
            results[name] = str(error), watch.findings
            continue
    close = torch.allclose(out.double(), wanted.double(), rtol=2**-7, atol=0, equal_nan=True)
    results[name] = close, watch.findings
shaped = torch.randn(16, 16).bfloat16()
for name, given in {"product": shaped, "through_a_helper": a, "atomic": a}.items():
    out = torch.zeros(given.shape, dtype=torch.float32 if name == "product" else torch.bfloat16)
    with bf16lint.watching() as watch:
        try:
            getattr(module, name)[(1,)](given, given, out)
        except InterpreterError:
            assert name == "atomic", name
    right = name == "product" and torch.allclose(out.double(), given.double() @ given.double(), rtol=0.1)
    results[name] = right, watch.findings
for name, found in registry.kernels().items():
    declaration = found.declaration
    with bf16lint.watching() as watch:
        for case in declaration.cases:
            if not case.large and "bfloat16" in declaration.tolerance:
                inputs = declaration.make_inputs(case, torch.bfloat16, torch.device("cpu"), 0)
                declaration.optimized(**inputs)
    results["clean " + name] = None, watch.findings
results["restored"] = [
    list(one) == list(two) and all(one[key] is two[key] for key in one) for one, two in zip(before, state())
], []
try:
    with bf16lint.watching():
        raise KeyError
except KeyError:
    results["restored after an error"] = [one == two for one, two in zip(before, state())], []
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "kernels"
    folder.mkdir()
    kernels = [KERNEL.format(index=index, expression=item[0]) for index, item in enumerate(EXPRESSIONS.values())]
    (folder / "planted.py").write_text(HEAD + "".join(kernels) + SHAPED)
    return folder / "planted.py"


@pytest.fixture(scope="module")
def results(planted: Path) -> Any:
    """What each kernel came to: whether it is right, and the findings."""
    wanted = json.dumps({name: item[:2] for name, item in EXPRESSIONS.items()})
    exemplars = Path(__file__).parent / "exemplars"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(planted), wanted],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "KERNBENCH_WORKSPACE": str(exemplars)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def line_of(planted: Path, text: str, after: str = "") -> str:
    lines = planted.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if after in line)
    return f"kernels/planted.py:{1 + next(index for index in range(start, len(lines)) if text in lines[index])}"


@pytest.mark.parametrize("name", [name for name, item in EXPRESSIONS.items() if item[2]])
def test_what_the_interpreter_gets_wrong_is_reported_by_file_and_line(name: str, results: Any, planted: Path) -> None:
    right, findings = results[name]
    if right is True:
        # Older versions cast for some of them.
        assert findings == []
        assert not triton.__version__.startswith("3.9"), "computed rightly by now: take it out of the lint"
        return
    if right is not False:
        # Triton 3.6 has no bfloat16 constants, and says so.
        assert "get_bf16" in right
        return
    place = line_of(planted, "result =", f"def kernel_{list(EXPRESSIONS).index(name)}(")
    start = re.compile(rf"{re.escape(place)}: ({EXPRESSIONS[name][2]})\b")
    assert any(map(start.match, findings)), findings
    assert {finding.split(": ")[0] for finding in findings} == {place}
    assert all("bfloat16" in finding and ".to(tl.float32)" in finding for finding in findings)


@pytest.mark.parametrize("name", [name for name, item in EXPRESSIONS.items() if not item[2]])
def test_what_the_interpreter_gets_right_is_not_reported(name: str, results: Any) -> None:
    right, findings = results[name]
    assert findings == []
    assert right is True or "get_bf16" in str(right)


def test_a_matrix_product_is_reported_at_its_own_line(results: Any, planted: Path) -> None:
    right, findings = results["product"]
    assert not right
    assert findings == [f"{line_of(planted, 'tl.dot(')}: multiplies matrices of {LOADED}; {ADVICE}"]


def test_a_helper_is_reported_once_with_its_caller(results: Any, planted: Path) -> None:
    place = f"{line_of(planted, 'return value + value')} (called from {line_of(planted, 'value = _helper(')})"
    assert results["through_a_helper"][1] == [f"{place}: adds {LOADED}; {ADVICE}"]


def test_an_atomic_addition_is_reported(results: Any, planted: Path) -> None:
    assert results["atomic"][1] == [
        f"{line_of(planted, 'tl.atomic_add')}: updates atomically {LOADED}; {ADVICE}"
    ]  # fmt: skip


def test_kernels_that_cast_after_loading_are_clean(results: Any) -> None:
    clean = {name: findings for name, (_, findings) in results.items() if name.startswith("clean ")}
    assert {"clean fused_adamw", "clean rms_norm", "clean linear"} <= clean.keys()
    assert not any(clean.values()), clean


def test_what_was_replaced_is_put_back(results: Any) -> None:
    assert results["restored"][0] == [True, True]
    assert results["restored after an error"][0] == [True, True]


def test_an_interpreter_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_fadd")
    with pytest.raises(KernbenchError, match=r"watched .*: .*create_fadd; use Triton"), bf16lint.watching():
        pass
    monkeypatch.delattr(interpreter, "ScanOps")
    with pytest.raises(KernbenchError, match="it has no ScanOps"), bf16lint.watching():
        pass
