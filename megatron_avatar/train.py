"""Train a recipe: python -m megatron_avatar.train recipe=NAME model.path=FOLDER data.manifest=FILE [key=value ...]

dry_run=true plans memory and time and starts nothing. Recipes: megatron_avatar/config/recipe; all settings:
megatron_avatar/config/schema.py. The same command continues a run.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_avatar.resilience.ended import FAILED, INTERRUPTED, REFUSED, leave_on_signals, tell, tell_failure

if TYPE_CHECKING:
    from megatron_avatar.config import Config


def main(arguments: list[str]) -> int:
    """Train one configuration; returns the exit status: 2 for a user's mistake, 75 where the same command continues."""
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    from megatron_avatar.first_words import tell as tell_first

    tell_first("reading the settings ...")  # on a busy machine half a minute passes before they are read
    from megatron_avatar.config import load_config
    from megatron_avatar.config.checks import check_family
    from megatron_avatar.config.paths import check_inputs, check_model, refuse
    from megatron_avatar.config.world import check_start

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    try:
        config = load_config(arguments)
        if config.dry_run:
            refuse(check_model(config.model.path, needs=("config.json",)) if config.model.path else [])
            check_family(config)
            return _plan(config)
        refuse(check_inputs(config))
        check_family(config)
        if config.rl.rewards:  # before torch is read
            from megatron_avatar.rl.rewards.own import check

            check(config.rl.rewards)
        check_start(config, "megatron_avatar.train", arguments)
    except ValueError as error:
        return _refuse(error)
    tell_first(f"{config.name}: the settings are sound; loading torch and Megatron ...")
    from megatron_avatar.policy.backend import start, stop  # torch and Megatron only once the settings are sound
    from megatron_avatar.policy.devices import refuse_cpu
    from megatron_avatar.resilience.attempts import NoProgress
    from megatron_avatar.resilience.checkpoint import CheckpointError
    from megatron_avatar.training.guard import LogprobMismatch
    from megatron_avatar.training.learner import NonFiniteUpdates
    from megatron_avatar.training.loop import Interrupted, train
    from megatron_avatar.training.replay_step import replay_step
    from megatron_avatar.training.scoring import UNSCORED

    try:
        refuse_cpu(config.model.shape, config.cluster.gpu)
        backend = start(config.parallel, seed=config.seed)
    except ValueError as error:
        return _refuse(error)
    try:
        if config.replay_step:
            return replay_step(config, backend)
        train(config, backend)
        if backend.rank == 0:
            print(last_words(config), file=sys.stderr)
    except Interrupted:
        if backend.rank == 0:
            print(f"stopped; state saved in {config.output_dir}. The same command continues.", file=sys.stderr)
        return 0 if tell(INTERRUPTED) else INTERRUPTED  # a launcher kills the others at the first rank that returns 75
    except (ValueError, NoProgress) as error:
        return _refuse(error)
    except (LogprobMismatch, NonFiniteUpdates, CheckpointError, *UNSCORED, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        tell_failure()
        return FAILED
    except Exception:
        tell_failure()
        raise
    finally:
        stop()
    return 0


def last_words(config: Config) -> str:
    """What there is now, and where."""
    folder = Path(config.output_dir)
    export = folder / "export" / list(config.stages)[-1]
    return (f"done: the model is in {export}, metrics in {folder / 'metrics.jsonl'}. To evaluate it: python -m "
            f"eval.run model={export} benchmark=NAME data=FOLDER out=FOLDER")


def _refuse(error: Exception) -> int:
    """A user's mistake, in words: to try again would change nothing."""
    print(f"error: {error}", file=sys.stderr)
    tell(REFUSED)
    return REFUSED


def _plan(config: Config) -> int:
    """Print what the run would take; 0 where it fits the cluster, 2 where it doesn't."""
    from megatron_avatar.first_words import tell as tell_first

    tell_first(f"{config.name}: planning on shapes alone, nothing is started ...")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan touches no GPU, where there is one
    from megatron_avatar.planning.plan import dry_run

    return dry_run(config)


if __name__ == "__main__":
    leave_on_signals()
    sys.exit(main(sys.argv[1:]))
