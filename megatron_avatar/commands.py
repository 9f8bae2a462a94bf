"""What an installed package brings as commands: avatar-train, avatar-export, avatar-plan, avatar-doctor.

Each is `python -m megatron_avatar.NAME`, wherever it is called. Preparing data, evaluation, the Slurm scripts, the demo
and its models are no part of the package: they run from a checkout.
"""

from __future__ import annotations

import sys


def train() -> int:
    """avatar-train recipe=NAME model.path=FOLDER data.manifest=FILE [key=value ...]"""
    from megatron_avatar.resilience.ended import leave_on_signals
    from megatron_avatar.train import main

    leave_on_signals()
    return main(sys.argv[1:])


def plan() -> int:
    """avatar-plan recipe=NAME [key=value ...]: memory and time of a run, nothing started."""
    from megatron_avatar.train import main

    if len(sys.argv) == 1 or "--help" in sys.argv:
        print("usage: avatar-plan recipe=NAME [cluster.gpu=a100 key=value ...]: memory by item and hours of a training")
        return 0 if "--help" in sys.argv else 2
    return main([*sys.argv[1:], "dry_run=true"])


def export() -> int:
    """avatar-export RUN out=FOLDER [step=N] [adapters=true|hub]"""
    from megatron_avatar.export import main

    return main(sys.argv[1:])


def doctor() -> int:
    """avatar-doctor [--json] [--calibrate]: what this machine can run."""
    from megatron_avatar.doctor import main

    main()
    return 0
