"""Synthetic records for the report tests: every field filled, figures plausible, one name hostile."""

from __future__ import annotations

import random
from typing import Any

from kernbench.record import (
    Arm,
    BenchRecord,
    BenchResult,
    Build,
    Ceilings,
    Clocks,
    CompareRecord,
    Device,
    Environment,
    Errors,
    Git,
    Hotspot,
    Idle,
    Launches,
    MutantResult,
    Overhead,
    ParityRecord,
    ParityResult,
    Part,
    PhaseInfo,
    Prediction,
    ProfileRecord,
    Ratio,
    SanitizerResult,
    SiteHit,
    SourceLine,
    Span,
    Stage,
    Stall,
    Steps,
    SwapRecord,
    Throughput,
    Verdict,
    WorkloadInfo,
)

HOSTILE = "<script>alert(1)</script>&\"[red]'"
OPTIMIZER = "workloads/titan_mac/optimizer.py"
MEMORY = "workloads/titan_mac/memory.py"
LONG_GEMM = "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1_execute_k_off_kernel_cublas"
LONG_ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"


def environment(device: str = "cuda") -> Environment:
    if device == "cpu":
        return Environment(
            device=Device(type="cpu", name="cpu", memory_bytes=0),
            python="3.11.7",
            torch="2.13.0+cpu",
            triton="3.9.0",
            kernbench="0.1.0",
            platform="Linux 6.1 x86_64",
            cpu="AMD EPYC 7B13",
            cpu_threads=2,
            ceilings=Ceilings(
                copy_bytes_per_second=21.4e9,
                triad_bytes_per_second=19.8e9,
                matmul_flops_per_second={"float32": 121e9},
                launch_seconds=1.1e-6,
            ),
        )
    return Environment(
        device=Device(
            type="cuda",
            name="NVIDIA H200",
            capability="9.0",
            memory_bytes=150_754_820_096,
            l2_bytes=62_914_560,
            driver="570.124",
            runtime="12.8",
        ),
        python="3.12.9",
        torch="2.11.0+cu128",
        triton="3.6.0",
        kernbench="0.1.0",
        platform="Linux 6.8 x86_64",
        cpu="Intel Xeon Platinum 8468",
        cpu_threads=16,
        ceilings=Ceilings(
            copy_bytes_per_second=3.98e12,
            triad_bytes_per_second=4.05e12,
            matmul_flops_per_second={"float32": 51.3e12, "tf32": 402e12, "bfloat16": 731e12},
            launch_seconds=2.3e-6,
        ),
    )


def workload(**changes: Any) -> WorkloadInfo:
    fields: dict[str, Any] = {
        "name": "titan-mac",
        "preset": "seed",
        "dtype": "float32",
        "seed": 0,
        "unit": "tokens",
        "parameters": 45_211_393,
    }
    return WorkloadInfo(**(fields | changes))


def stalls(device: str = "cuda") -> list[Stall]:
    real = device == "cuda"

    def stall(file: str, line: int, source: str, op: str, count: float, klass: str, **more: Any) -> Stall:
        if not real:
            klass, more = ("cpu-tensor" if klass == "cpu-tensor" else "would-sync"), {}
        fields = {"file": file, "line": line, "source": source, "op": op, "count_per_step": count, "class": klass}
        return Stall(
            **{("klass" if key == "class" else key): value for key, value in fields.items()},  # type: ignore[arg-type]
            real=real and klass != "cpu-tensor",
            **more,
        )

    return [
        stall(
            OPTIMIZER,
            88,
            "if torch.isnan(norm) or torch.isinf(norm):",
            "aten::is_nonzero",
            3.0,
            "drain",
            wait_seconds_per_step=4.1e-3,
            saving_seconds_per_step=3.2e-3,
            function="DeepNestedOptimizer.step",
            phase=0,
        ),
        stall(
            MEMORY,
            141,
            "if grad_norm > self.max_norm:",
            "aten::is_nonzero",
            1.0,
            "busy",
            wait_seconds_per_step=6.2e-3,
            saving_seconds_per_step=1.1e-3,
            function="NeuralMemory.update",
            phase=0,
        ),
        stall(
            OPTIMIZER,
            131,
            "lrs = multipliers.tolist()",
            "aten::_to_copy",
            1.0,
            "starved",
            wait_seconds_per_step=0.05e-3,
            function="DeepNestedOptimizer.step",
        ),
        stall(
            "workloads/titan_mac/train.py",
            52,
            f'print(loss.item(), "{HOSTILE}")',
            "aten::item",
            1.0,
            "free",
            wait_seconds_per_step=3e-6,
        ),
        stall("torch/optim/adamw.py", 402, "step = _get_value(step_t)", "aten::item", 312.0, "cpu-tensor"),
    ]


def hotspots(device: str = "cuda") -> list[Hotspot]:
    kind: Any = "kernel" if device == "cuda" else "op"
    rows = [
        (LONG_GEMM, 9.8e-3, 0.31, 96.0, "compute", None),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", 6.1e-3, 0.19, 12.0, "memory", 3),
        (LONG_ADD, 3.3e-3, 0.105, 411.0, "launch", None),
        (HOSTILE, 1.9e-3, 0.06, 7.0, None, 1),
        ("Memcpy DtoH (Device -> Pageable)", 1.2e-4, 0.004, 6.0, None, None),
    ]  # fmt: skip
    return [
        Hotspot(
            name=name,
            self_seconds_per_step=seconds,
            share=share,
            calls_per_step=calls,
            kind="copy" if name.startswith("Memcpy") and device == "cuda" else kind,
            op="aten::mm" if index == 0 else "",
            source=SourceLine(file=MEMORY, line=60 + index, text=f"y = F.linear(h, self.w2)  # {HOSTILE}")
            if index < 4
            else None,
            bound=bound,
            phase=phase,
        )
        for index, (name, seconds, share, calls, bound, phase) in enumerate(rows)
    ]


def breakdown(scale: float = 1.0, idle: float = 1.0) -> list[Part]:
    return [
        Part(cause="matrix products", seconds_per_step=33.0e-3 * scale, description="gemm kernels"),
        Part(cause="optimizer", seconds_per_step=17.2e-3 * scale, description="multi-tensor kernels"),
        Part(cause="elementwise", seconds_per_step=11.9e-3 * scale, description="pointwise and reductions"),
        Part(cause="copies", seconds_per_step=1.0e-3 * scale, description="device to host and back"),
        Part(
            cause="idle: host reads",
            seconds_per_step=17.0e-3 * idle,
            description="the device ran dry behind a read",
            busy=False,
        ),
        Part(
            cause="idle: host is late",
            seconds_per_step=12.0e-3 * idle,
            description="launches come slower than kernels end",
            busy=False,
        ),
    ]


def timeline(seed: int = 0, kernels: int = 900) -> list[Span]:
    source = random.Random(seed)
    spans = [
        Span(track="host: main", name="forward", start_seconds=0.0, duration_seconds=30e-3, kind="range"),
        Span(track="host: main", name="backward", start_seconds=31e-3, duration_seconds=34e-3, kind="range"),
        Span(
            track="host: main",
            name="kernbench.phase0:NeuralMemory.update",
            start_seconds=66e-3,
            duration_seconds=20e-3,
            kind="range",
        ),
    ]
    host = device = 0.0
    for index in range(kernels):
        host += source.uniform(20e-6, 90e-6)
        spans.append(
            Span(track="host: main", name="cudaLaunchKernel", start_seconds=host, duration_seconds=6e-6, kind="runtime")
        )
        start = max(device, host + 5e-6)
        length = 200e-6 if index == 7 else source.choice([3e-6, 8e-6, 40e-6, 200e-6])
        name = HOSTILE if index == 7 else f"gemm_{index % 9}"
        spans.append(Span(track="stream 7", name=name, start_seconds=start, duration_seconds=length, kind="kernel"))
        device = start + length
        if index % 150 == 149:
            spans.append(
                Span(
                    track="host: main",
                    name="cudaStreamSynchronize",
                    start_seconds=host,
                    duration_seconds=max(device - host, 0) + 10e-6,
                    kind="sync",
                )
            )
            host = device + 10e-6
    return spans


def profile(device: str = "cuda", *, middle: float = 92.1e-3, scale: float = 1.0, **changes: Any) -> ProfileRecord:
    source = random.Random(int(middle * 1e6))
    seconds = [middle * (1 + source.gauss(0, 0.004)) for _ in range(19)] + [middle * 1.09]
    tokens = 2048.0
    on_gpu = device == "cuda"
    fields: dict[str, Any] = {
        "run_id": "20261121-142530-profile-3fa9",
        "created_utc": "2026-11-21T14:25:30+00:00",
        "command": "kernbench profile titan-mac --preset seed",
        "environment": environment(device),
        "git": Git(commit="8db15c2d41f0aa", dirty=False),
        "status": "complete",
        "stages": [Stage(name=name, status="done", seconds=2.5) for name in ("time", "trace", "lines")],
        "warnings": [],
        "workload": workload(),
        "steps": Steps(seconds=seconds, units_per_step=tokens, warmup=5, losses=[10.8, 10.7]),
        "throughput": Throughput(
            units_per_second=tokens / middle, interval=(tokens / (middle * 1.011), tokens / (middle * 0.99))
        ),
        "breakdown": breakdown(scale),
        "hotspots": hotspots(device),
        "stalls": stalls(device),
        "syncs_per_step": 6.0,
        "cpu_reads_per_step": 312.0,
        "launches_per_step": 1421.0,
        "launches": Launches(
            per_step=1421.0,
            kernels_per_step=1380.0,
            copies_per_step=29.0,
            memsets_per_step=12.0,
            median_seconds=3.1e-6 if on_gpu else None,
            short_share=0.83 if on_gpu else None,
        ),
        "idle": Idle(
            busy_seconds_per_step=63.1e-3, idle_seconds_per_step=29e-3, causes={"host reads": 17e-3, "launch": 12e-3}
        )
        if on_gpu
        else None,
        "overhead": Overhead(trace_ratio=1.31, lines_ratio=4.2),
        "timeline": timeline(),
        "memory_peak_bytes": 4_194_304_000 if on_gpu else None,
        "clocks": Clocks(sm_hz=1.98e9, memory_hz=3.2e9, power_watts=412.0, temperature_celsius=51.0)
        if on_gpu
        else None,
    }
    return ProfileRecord(**(fields | changes))


def interrupted_profile() -> ProfileRecord:
    stages = [
        Stage(name="time", status="done", seconds=2.0),
        Stage(name="trace", status="interrupted", seconds=0.7),
    ]
    empty: dict[str, Any] = {
        "breakdown": [], "hotspots": [], "stalls": [], "syncs_per_step": None, "cpu_reads_per_step": None,
        "launches_per_step": None, "launches": None, "idle": None, "overhead": None, "timeline": [],
    }  # fmt: skip
    return profile("cpu", status="interrupted", stages=stages, **empty)


def parity_results(failing: bool = False) -> list[ParityResult]:
    rows = []
    for case in ("401-tensors", "ragged", "one", "large"):
        for dtype in ("float32", "bfloat16"):
            for mode in ("forward contiguous", "forward strided", "10 updates"):
                eager = Errors(max=3.1e-7, rms_ratio=4.4e-8, mean=1e-10)
                bad = failing and case == "ragged" and dtype == "bfloat16" and mode == "10 updates"
                rows.append(
                    ParityResult(
                        kernel="fused_adamw",
                        case=case,
                        dtype=dtype,
                        mode=mode,
                        passed=not bad,
                        errors=Errors(max=9.0 if bad else 3.4e-7, rms_ratio=4.9e-8, mean=2e-10),
                        eager_errors=eager,
                        bound=8.6e-7,
                        limits=Errors(max=8.6e-7, rms_ratio=1.2e-7, mean=3e-9),
                        tensor="param",
                        mutants_killed=(5, 5) if mode.startswith("forward") else None,
                        bitwise=True,
                        seconds=0.2,
                        reason="max error 9 is over the bound 8.6e-07 in param" if bad else "",
                    )
                )
    rows.append(
        ParityResult(
            kernel="titan-mac phase 3",
            case="10 steps",
            dtype="float32",
            mode="real steps",
            passed=True,
            errors=Errors(max=1e-5, rms_ratio=2e-6, mean=0.0),
            eager_errors=Errors(max=1e-5, rms_ratio=2e-6, mean=0.0),
            bound=3e-5,
        )
    )
    rows.append(
        ParityResult(
            kernel="fused_adamw", case="generated", dtype="float32", mode="generated", passed=True, examples=37
        )
    )
    rows.append(graded(failing))
    rows.append(
        ParityResult(
            kernel=HOSTILE, case="nan-step", dtype="float32", mode="fault", passed=True, bitwise=True, tensor="state"
        )
    )
    return rows


def swap(device: str = "cuda", *, decision: Any = "keep", **changes: Any) -> SwapRecord:
    source = random.Random(3)
    before = profile(device)
    quiet = stalls(device)
    after = profile(
        device,
        middle=74.9e-3,
        workload=workload(phases=[0], implementations={"0": "python"}),
        breakdown=breakdown(1.0, idle=0.407),
        stalls=[quiet[3], quiet[4]],
        syncs_per_step=1.0,
        launches_per_step=1398.0,
        launches=Launches(per_step=1398.0, kernels_per_step=1362.0, copies_per_step=24.0, memsets_per_step=12.0),
        timeline=timeline(1, kernels=800),
        idle=Idle(busy_seconds_per_step=63.1e-3, idle_seconds_per_step=11.8e-3) if device == "cuda" else None,
    )
    rounds = 30
    drift = [1 + 0.02 * source.random() for _ in range(rounds)]
    arms = [
        Arm(name="before", seconds=[92.1e-3 * drift[i] * source.gauss(1, 0.004) for i in range(rounds)]),
        Arm(name="again", seconds=[92.1e-3 * drift[i] * source.gauss(1, 0.004) for i in range(rounds)]),
        Arm(name="after python", seconds=[74.9e-3 * drift[i] * source.gauss(1, 0.004) for i in range(rounds)]),
    ]
    fields: dict[str, Any] = {
        "run_id": "20261121-151000-swap-phase0-77aa",
        "created_utc": "2026-11-21T15:10:00+00:00",
        "command": "kernbench swap --phase 0 titan-mac",
        "environment": environment(device),
        "git": Git(commit="8db15c2d41f0aa", dirty=True),
        "status": "complete",
        "stages": [Stage(name=name, status="done", seconds=9.5) for name in ("parity", "race", "verdict")],
        "workload": workload(phases=[], implementations={}),
        "phase": PhaseInfo(number=0, title="no host syncs", flag="TITAN_SYNC_FREE", implementation="python"),
        "predicted": Prediction(
            text="Five of six reads go; the device no longer runs dry behind them.",
            claim="Phase 0: 20-30 % (seed document)",
            syncs_per_step=5.0,
            launches_per_step=26.0,
            ratio_low=1.05,
            ratio_high=1.25,
            basis="replay of the trace before",
        ),
        "before": before,
        "after": after,
        "parity": parity_results(),
        "ratio": Ratio(
            median=1.2298,
            low=1.2241,
            high=1.2352,
            noise_floor=0.0041,
            rounds=rounds,
            steps_per_round=4,
            a_a=(0.9969, 1.0041),
            dropped_rounds=1,
        ),
        "arms": arms,
        "clocks": [
            Clocks(sm_hz=1.98e9 - 1e6 * i, memory_hz=3.2e9, power_watts=400.0 + i, temperature_celsius=50.0 + i / 10)
            for i in range(rounds)
        ],
        "receipt": [
            SiteHit(
                site="titan_mac.memory:NeuralMemory.update", implementation="python", calls=124, calls_per_step=1.0
            ),
            SiteHit(
                site="titan_mac.optimizer:DeepNestedOptimizer._guard",
                implementation="triton",
                calls=124,
                calls_per_step=1.0,
                kernel="fused_guard",
            ),
        ],
        "verdict": Verdict(
            decision=decision,
            sentence="1.23x faster (95 % interval 1.22-1.24), above the A/A floor, parity green",
            reasons=["the interval excludes 1", "the effect exceeds the A/A floor of 0.4 %"],
        ),
    }
    return SwapRecord(**(fields | changes))


def unmeasured_swap() -> SwapRecord:
    """A Triton phase on a CPU: parity ran, no race, no side after."""
    return swap(
        "cpu",
        decision="inconclusive",
        phase=PhaseInfo(number=3, title="fused AdamW", flag="TITAN_FUSED_ADAMW", implementation="triton"),
        after=None,
        ratio=None,
        arms=[],
        clocks=[],
        verdict=Verdict(
            decision="inconclusive",
            sentence="parity is green; speed is not measured here",
            reasons=["on the CPU a Triton kernel runs in the interpreter"],
        ),
    )


def graded(failing: bool = False) -> ParityResult:
    """The row of a gate that graded itself."""
    mutants = [
        MutantResult(name="drops the second term of add (call 7 of 31)", kind="altered", outcome="killed", reason="9"),
        MutantResult(name="eps times 10", kind="altered", outcome="equivalent", reason="differs by 1e-14"),
        MutantResult(name=HOSTILE, kind="hostile", outcome="killed", reason="answers for another call"),
        MutantResult(name="works on another stream", kind="hostile", outcome="needs a GPU", reason="no streams here"),
        MutantResult(name="returns zeros", kind="result", outcome="survived" if failing else "killed"),
    ]
    return ParityResult(
        kernel="fused_adamw", case="ragged", dtype="float32", mode="gate", passed=not failing,
        mutants_killed=(2, 3) if failing else (3, 3), mutants=mutants,
        reason="lets 1 of 3 wrong kernels pass: returns zeros" if failing else "",
    )  # fmt: skip


def sanitized() -> ParityRecord:
    """A run of compute-sanitizer alone, with one finding."""
    return ParityRecord(
        run_id="20261121-161500-parity-55ff",
        created_utc="2026-11-21T16:15:00+00:00",
        command="kernbench parity --sanitize",
        environment=environment(),
        status="complete",
        sanitizer=[
            SanitizerResult(kernel="fused_adamw", tool="racecheck", passed=True, errors=0),
            SanitizerResult(
                kernel=HOSTILE, tool="memcheck", passed=False, errors=2, findings=["reads 4 bytes past x", HOSTILE]
            ),
        ],
    )


def built() -> BenchRecord:
    """A compile matrix with one build that spills."""
    builds = [
        Build(
            kernel="fused_adamw", function="_update_kernel", arch=arch, dtype="float32", cases=["ragged", HOSTILE],
            passed=arch != "sm_80", warps=4, registers=255, spill_bytes=64 if arch == "sm_80" else 0, shared_bytes=2048,
            instructions=1204, reason="spills 64 bytes a thread" if arch == "sm_80" else "",
        )
        for arch in ("sm_90", "sm_80", "sm_100")
    ]  # fmt: skip
    return BenchRecord(
        run_id="20261121-171500-bench-66aa",
        created_utc="2026-11-21T17:15:00+00:00",
        command="kernbench bench --compile-only",
        environment=environment("cpu"),
        status="complete",
        builds=builds,
    )


def parity(failing: bool = False) -> ParityRecord:
    return ParityRecord(
        run_id="20261121-160000-parity-11bb",
        created_utc="2026-11-21T16:00:00+00:00",
        command="kernbench parity fused_adamw",
        environment=environment(),
        status="complete",
        results=parity_results(failing),
    )


def bench(device: str = "cuda") -> BenchRecord:
    rows = []
    for case, base, moved in (("401-tensors", 410e-6, 1.27e9), ("seed", 380e-6, 1.2e9), ("tiny", 9e-6, 4e5)):
        for name, factor in (("eager", 1.0), ("compile", 0.82), ("triton", 0.71), ("torch fused", 0.74)):
            if device == "cpu" and name == "triton":
                rows.append(
                    BenchResult(
                        kernel="fused_adamw", case=case, dtype="float32", implementation=name, seconds=None,
                        label="not measured here", note="Triton's interpreter has no speed of its own",
                    )
                )  # fmt: skip
                continue
            seconds = base * factor
            above_roof = name == "torch fused" and case == "seed"
            flops = moved / 28 * 15
            rows.append(
                BenchResult(
                    kernel="fused_adamw",
                    case=case,
                    dtype="float32",
                    implementation=name,
                    seconds=seconds,
                    interval=(seconds * 0.985, seconds * 1.02),
                    bytes=moved,
                    flops=flops,
                    bytes_per_second=moved / seconds,
                    flops_per_second=flops / seconds,
                    share_of_roof=1.05 if above_roof else min(moved / seconds / 4.0e12, 0.97),
                    speedup=(1 / factor, 0.98 / factor, 1.02 / factor),
                    noise_floor=0.004,
                    cache="cold",
                    label="launch-bound" if case == "tiny" else "impossible" if above_roof else "",
                    note="data lives in the L2 cache" if above_roof else "",
                )
            )
    rows.append(
        BenchResult(
            kernel=HOSTILE,
            case="ragged",
            dtype="bfloat16",
            implementation="eager",
            seconds=2e-5,
            interval=(1.9e-5, 2.1e-5),
        )
    )
    return BenchRecord(
        run_id="20261121-170000-bench-22cc",
        created_utc="2026-11-21T17:00:00+00:00",
        command="kernbench bench fused_adamw",
        environment=environment(device),
        status="complete",
        results=rows,
    )


def workload_bench() -> BenchRecord:
    """The phases of a workload and its peers, timed against each other."""
    rows = [
        BenchResult(
            kernel="titan-mac", case="seed", dtype="float32", implementation=name, seconds=seconds,
            interval=(seconds * 0.99, seconds * 1.01), units_per_second=2048 / seconds, speedup=(92e-3 / seconds,) * 3,
            launches_per_step=launches, syncs_per_step=syncs,
        )
        for name, seconds, launches, syncs in (
            ("baseline", 92e-3, 1421.0, 6.0), ("phase 0", 75e-3, 1398.0, 1.0),
            ("phases 0, 3", 66e-3, 1002.0, 1.0), ("torch.compile", 71e-3, 700.0, 6.0),
        )
    ]  # fmt: skip
    source = random.Random(9)
    return BenchRecord(
        run_id="20261121-180000-bench-33dd",
        created_utc="2026-11-21T18:00:00+00:00",
        command="kernbench bench titan-mac",
        environment=environment(),
        status="complete",
        workload=workload(),
        results=rows,
        arms=[
            Arm(name=row.implementation, seconds=[(row.seconds or 0) * source.gauss(1, 0.01) for _ in range(30)])
            for row in rows
        ],
    )


def comparison() -> CompareRecord:
    sides = swap()
    assert sides.before is not None
    assert sides.after is not None
    return CompareRecord(
        run_id="20261121-190000-compare-44ee",
        created_utc="2026-11-21T19:00:00+00:00",
        command="kernbench compare 3fa9 77aa",
        environment=environment(),
        status="complete",
        warnings=["the presets differ: tiny and seed"],
        before=sides.before,
        after=sides.after,
        ratio=Ratio(median=1.2296, low=1.219, high=1.241, noise_floor=0.0, rounds=20, steps_per_round=1),
        verdict=Verdict(decision="keep", sentence="the second run is 1.23x faster", reasons=[]),
    )


def all_kinds() -> dict[str, Any]:
    # It is built from the samples above.
    import report_traces

    return {
        "profile": profile(),
        "profile-cpu": profile("cpu"),
        "profile-interrupted": interrupted_profile(),
        "swap": swap(),
        "swap-unmeasured": unmeasured_swap(),
        "swap-rejected": swap(decision="reject", parity=parity_results(failing=True)),
        "parity": parity(),
        "parity-failed": parity(failing=True),
        "parity-sanitized": sanitized(),
        "bench": bench(),
        "bench-builds": built(),
        "bench-cpu": bench("cpu"),
        "bench-workload": workload_bench(),
        "comparison": comparison(),
        **report_traces.all_kinds(),
    }
