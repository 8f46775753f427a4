"""What there is to name on the command line: workloads, kernels, and the runs on disk."""

from __future__ import annotations

from typing import Any

from kernbench import record, registry, state


def runs() -> list[dict[str, Any]]:
    """Finished and unfinished runs, newest first; a damaged record is listed with the reason. Imports no torch."""
    workspace = registry.current()
    listing = []
    for path in sorted(workspace.records(), key=lambda path: path.parent.name, reverse=True):
        row: dict[str, Any] = {"run": path.parent.name, "folder": str(path.parent), "group": path.parent.parent.name}
        try:
            found = record.read(path)
        except record.RecordError as error:
            listing.append({**row, "kind": "damaged", "status": str(error)})
            continue
        listing.append({**row, "kind": record.kind(found), "status": found.status, "created_utc": found.created_utc})
    return listing


def declarations() -> dict[str, Any]:
    """Workloads with presets and phases, kernels with cases, and which phases are kept in this workspace."""
    workspace = registry.current()
    kept = state.load(workspace.root).kept
    workloads = []
    for name, found in registry.workloads().items():
        declaration = found.declaration
        active = {item.number: item.implementation for item in kept.get(name, [])}
        workloads.append(
            {
                "name": name,
                "summary": declaration.summary,
                "unit": declaration.unit,
                "presets": list(declaration.presets),
                "phases": [
                    {"number": phase.number, "title": phase.title, "flag": phase.flag, "kept": active.get(phase.number)}
                    for phase in declaration.phases
                ],
                "file": str(found.file),
            }
        )
    kernels = [
        {
            "name": name,
            "cases": [case.name for case in found.declaration.cases],
            "dtypes": list(found.declaration.tolerance),
            "file": str(found.file),
        }
        for name, found in registry.kernels().items()
    ]
    return {"workspace": str(workspace.root), "workloads": workloads, "kernels": kernels}
