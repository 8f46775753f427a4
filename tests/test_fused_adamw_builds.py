"""What the fused AdamW is compiled to, without a GPU: wide loads, and registers that leave room."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from test_fused_adamw import SPEC

from kernbench.compilation import builds

COMPILE = """
import json, re, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernbench import registry

module = sys.modules[registry.kernel("fused_adamw").declaration.optimized.__module__]
scalars = dict.fromkeys(("beta1_complement", "beta2", "beta2_complement", "eps"), "fp32")
types = {"chunks": "*i64", "table": "*i64", "factors": "*fp32", "ok": "*i1", **scalars}
aligned = {(index,): [["tt.divisibility", 16]] for index in range(4)}
wide = {}
for capability in (80, 90, 100):
    for dtype in module.TRITON_DTYPES.values():
        for launch in (module.CACHED, module.STREAMED):
            constants = {
                "TENSOR_BITS": 24, "DTYPE": dtype, "BLOCK": launch.block, "THREADS": 32 * launch.warps,
                "INTERPRETED": False,
            }
            signature = {**types, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(fn=module._update_kernel, signature=signature, constexprs=constants, attrs=aligned)
            options = {"num_warps": launch.warps}
            ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
            loads = {width: len(re.findall(rf"ld\\.global\\S*\\.v{width}\\.b32", ptx)) for width in (2, 4)}
            wide[f"sm_{capability} {dtype} {launch}"] = loads
print(json.dumps(wide))
"""


def test_loads_are_wide_on_three_architectures() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 3 * 3 * 2
    for name, loads in results.items():
        # Four elements a thread of p, g, m and v; of a 16-bit dtype those of p and g are 8 bytes wide.
        short = "fp32" not in name
        assert loads["4"] >= (2 if short else 4), (name, loads)
        assert loads["2"] >= (2 if short else 0), (name, loads)


def test_registers_leave_room_for_a_full_multiprocessor() -> None:
    for build in builds.compile_kernels([SPEC]):
        # 64 registers leave room for 1024 threads: enough loads in flight to hide the latency.
        assert build.registers is not None
        assert build.registers <= 64, build
        assert build.shared_bytes == 0, build
