"""A run's optimizer: gradient buffers, main weights, AdamW and a stage's learning rate, on Megatron-Core."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import nn

from megatron_avatar.config.schema import OptimConfig, ParallelConfig
from megatron_avatar.config.validate import SCHEDULES
from megatron_avatar.policy.fusions import choose_fusions, pin
from megatron_avatar.resilience.shares import share

DISTRIBUTED_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}  # tensors shaped like the weights
# Names of the distributed optimizer's tensors -> those in a checkpoint, which are the plain optimizer's.
NAMES = {"param": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
# float16's loss scale: where it begins, what it falls to, updates without overflow before it doubles. One overflow
# halves it. A step of reinforcement learning is dear: it begins low and rises slowly.
FIRST_SCALE, LEAST_SCALE, RISES_AFTER = 2.0**16, 1.0, 200


class Optimization:
    """The wrapped policy and its optimizer, which live as long as the run; `renew` begins a stage.

    `model` is what the pipeline schedule runs: Megatron's data-parallel wrapper, whose fp32 buffers collect the
    gradients of every parameter that was trainable when it was built. One that is frozen later rests: neither gradient
    nor weight decay moves it. `lr` is the rate of the latest update, `skipped` counts the stage's updates refused for
    non-finite numbers, `skipped_in_row` those since the latest one applied. In float16 `loss_scale` is what gradients
    are multiplied with on their way, and `overflows` counts those of the stage's skipped updates that a smaller scale
    answers; they don't count as in a row, but for themselves (`overflows_in_row`, since the latest one applied). With
    the distributed optimizer a rank keeps main weights and moments of its share of the gradient buffer, and the weights
    themselves move into a buffer of their own.
    """

    def __init__(
        self, policy: nn.Module, optimizer_config: OptimizerConfig, optim: OptimConfig, total_steps: int
    ) -> None:
        config = get_model_config(policy)
        self._distributed = optimizer_config.use_distributed_optimizer
        buffers = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self._distributed
        )
        self.model = DistributedDataParallel(config, buffers, policy)
        config.finalize_model_grads_func = finalize_model_grads
        (self._optimizer,) = get_megatron_optimizer(optimizer_config, [self.model]).chained_optimizers
        self._scaler: DynamicGradScaler | None = getattr(self._optimizer, "grad_scaler", None)
        if self._scaler is not None:
            config.grad_scale_func = lambda loss: loss * self._scaler.scale
        self._optimizer.sharded_param_state_fully_reshardable = self._shares
        self._torch_adam = isinstance(self._optimizer.optimizer, torch.optim.AdamW)
        for group in self._groups if self._torch_adam and torch.cuda.is_available() else ():
            group["fused"] = True  # one kernel, and no temporaries as large as the moments
        # Moments and step exist before the first update, so that any checkpoint can be loaded.
        self._optimizer.init_state_fn(self._optimizer.optimizer, optimizer_config)
        self._schedule(optim, optimizer_config.lr, total_steps)

    def renew(self, optim: OptimConfig, *, lr: float, total_steps: int) -> None:
        """Begin another stage: moments, schedule and counts afresh. The weights stay, main weights to the last bit.

        Raises ValueError for settings out of range.
        """
        check_schedule(optim, lr, total_steps)
        for state in self._optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        for group in self._groups:
            group["max_lr"], group["min_lr"] = lr, optim.min_lr
        self._schedule(optim, lr, total_steps)

    def _schedule(self, optim: OptimConfig, lr: float, total_steps: int) -> None:
        """Put the learning rate at the beginning of a stage of `total_steps` updates."""
        self._scheduler = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=round(optim.warmup_fraction * total_steps),
            lr_decay_steps=total_steps + 1,  # the last update still learns
            lr_decay_style=optim.schedule,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )
        self._scheduler.step(1)  # update k = 1, 2, … uses the schedule's point k: no update at a rate of zero
        self.lr = 0.0
        self.skipped = self.skipped_in_row = self.overflows = self.overflows_in_row = 0
        self._count_updates()

    @property
    def loss_scale(self) -> float | None:
        """Of the next update; None but in float16."""
        return None if self._scaler is None else float(self._scaler.scale)

    @property
    def updates(self) -> int:
        """Of the stage so far, those that were skipped too."""
        return self._scheduler.num_steps - 1

    @contextmanager
    def least_scale(self) -> Iterator[None]:
        """Gradients by the least loss scale there is: what isn't finite then, no scale makes so."""
        assert self._scaler is not None, "float16 alone has a loss scale"
        usual, self._scaler._scale = self._scaler._scale, self._scaler.min_scale
        try:
            yield
        finally:
            self._scaler._scale = usual

    def no_overflow(self) -> None:
        """The latest overflow was none: no scale makes it finite, so it counts as in a row."""
        self.overflows -= 1
        self.skipped_in_row += 1

    def not_finite(self) -> list[tuple[int, str]]:
        """Numbers and names of this stage's parameters whose gradient of the latest backward pass holds a number on
        this rank that is not finite."""
        return [(number, name) for number, (name, p) in enumerate(self.model.module.named_parameters())
                if p.requires_grad and hasattr(p, "main_grad") and not bool(p.main_grad.isfinite().all())]

    def main_weights(self) -> dict[str, torch.Tensor]:
        """Name -> float32 main weight of every parameter: in float32 the weight itself, with the distributed optimizer
        this rank's flat share of it (names without a share are left out). What the updates change, not a copy."""
        named = ((name, self._main(parameter)) for name, parameter in self.model.module.named_parameters())
        return {name: main.detach() for name, main in named if main is not None}

    def _main(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """What AdamW updates in place of the parameter; None where it updates nothing of it on this rank."""
        if not self._distributed:
            return getattr(parameter, "main_param", parameter) if hasattr(parameter, "main_grad") else None
        place = self._optimizer.model_param_group_index_map.get(parameter)
        return None if place is None else self._groups[place[0]]["params"][place[1]]

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, *, usable: bool = True) -> tuple[float, bool]:
        """Clip the gradients and update the weights: (norm before clipping, whether the update was skipped).

        Gradients must have been reduced over the ranks, which the pipeline schedule does. A norm that is not finite,
        or a caller who found the step not `usable`, skips the update on every rank alike; the schedule advances all
        the same. In float16 the loss scale follows: a skip for which it fell is an overflow.
        """
        before = self.loss_scale
        found = self._optimizer.prepare_grads()  # in float16: whether the scaler saw a number that is not finite
        resting = [self._main(p) for p in self.model.params_with_grad if not p.requires_grad]
        for main in resting:
            if main is not None:
                main.grad = None  # AdamW passes it over
        norm = float(self._optimizer.get_grad_norm())
        applied = usable and math.isfinite(norm)
        if applied:
            if (limit := self._optimizer.config.clip_grad) > 0 and (parameters := self._optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, limit, norm)
            self._optimizer.step_with_ready_grads()
        self.lr = self._groups[0]["lr"]
        self.skipped += not applied
        fell = self.loss_scale is not None and before is not None and self.loss_scale < before
        if applied:
            self.overflows_in_row = self.skipped_in_row = 0
        elif usable and found and fell:
            self.overflows += 1
            self.overflows_in_row += 1
        else:
            self.skipped_in_row += 1
        self._scheduler.step(1)
        if resting:
            self._count_updates()  # AdamW counts for each alone, checkpoints know one count
        return norm, not applied

    def sharded_state_dict(self, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """State for Megatron's distributed checkpoint, sharded like `model_state` (the policy's sharded_state_dict).

        Its tensors have the same names with and without the distributed optimizer.
        """
        state = self._optimizer.sharded_state_dict(model_state, loading, metadata=DISTRIBUTED_FORMAT)
        state.pop("grad_scaler", None)  # which one optimizer of Megatron-Core reads back, and the other doesn't
        counts = {"points": self._scheduler.num_steps, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        if self._scaler is not None:
            scale = {**self._scaler.state_dict(), "scale": self.loss_scale}
            counts |= {"overflows": self.overflows, "overflows_in_row": self.overflows_in_row, "loss_scale": scale}
        return {"optimizer": state, "schedule": counts}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint returned for `sharded_state_dict`; settings stay as configured now.

        The policy's weights must have been loaded before.
        """
        counts = state["schedule"]
        scale = counts.get("loss_scale")  # of a run that was float16 before, too
        if self._scaler is not None and scale is not None:
            self._scaler.load_state_dict({**scale, "scale": torch.tensor([scale["scale"]])})
        if not self._distributed:  # whose shares have been loaded in place
            adamw = state["optimizer"].get("optimizer", {})  # bf16 has main weights beside it
            adamw = adamw if "state" in adamw else state["optimizer"]
            adamw["param_groups"] = [
                {**own, "params": loaded["params"]}
                for own, loaded in zip(self._groups, adamw["param_groups"], strict=True)
            ]
            if self._torch_adam:  # the distributed optimizer, and a state without updates, leave it out
                adamw["state"].setdefault("common_step", torch.tensor(0.0))
            own_scale = {} if self._scaler is None else {"grad_scaler": self._scaler.state_dict()}
            self._optimizer.load_state_dict({**state["optimizer"], **own_scale})
        self._scheduler.num_steps = counts["points"]
        self._scheduler.step(0)
        self.skipped, self.skipped_in_row = counts["skipped"], counts["skipped_in_row"]
        self.overflows, self.overflows_in_row = counts.get("overflows", 0), counts.get("overflows_in_row", 0)
        self._count_updates()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _shares(self, model_state: dict[str, Any], loading: bool, metadata: Any) -> list[list[ShardedTensor]]:
        """This rank's shares of main weights and moments, in place of Megatron-Core's gathering on one rank, which
        takes up to 32 bytes of host memory a parameter. Loading fills them where they are."""
        weights, _ = extract_sharded_tensors_and_factories(model_state)
        by_weight = {weight.data: weight for weight in nested_values(weights)}
        found = []
        for buffer in self._optimizer.gbuf_ranges:
            for places in itertools.chain.from_iterable(buffer.values()):
                for weight, ranges in places["param_map"].items():
                    sharded, start = by_weight[weight], ranges["param"].start
                    tensors = self._optimizer._get_main_param_and_optimizer_states(weight)
                    if weight.dtype == torch.float32:
                        del tensors["param"]  # a view of the weight, which is in `model_state` already
                    found += [
                        share(sharded, f"optimizer.state.{NAMES[name]}.{sharded.key}", tensor.detach().view(-1), start)
                        for name, tensor in tensors.items() if name in NAMES
                    ]  # fmt: skip
        return found

    def _count_updates(self) -> None:
        """Write the number of updates into AdamW's state: torch keeps one a parameter, fused kernels one a group."""
        updates = self._scheduler.num_steps - 1 - self.skipped
        for group in self._groups:
            if self._torch_adam:
                for parameter in group["params"]:
                    step = torch.tensor(float(updates), device=parameter.device)
                    self._optimizer.optimizer.state[parameter]["step"] = step
            else:
                group["step"] = updates


def build_optimizer(
    policy: nn.Module,
    optim: OptimConfig,
    *,
    lr: float,
    total_steps: int,
    parallel: ParallelConfig | None = None,
) -> Optimization:
    """Wrap `policy` and build AdamW for its trainable parameters: those that train in any stage of the run.

    The rate rises linearly over the first `optim.warmup_fraction` of `total_steps` to `lr`, then stays or falls to
    `optim.min_lr`. Biases and norms are exempt from weight decay. `parallel` says whether the optimizer is distributed
    and which kernels it may take. Raises ValueError for settings out of range.
    """
    check_schedule(optim, lr, total_steps)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the policy is trainable: nothing to optimize")
    (dtype,) = {p.dtype for p in trainable}  # Megatron-Core mixes up the moments of a model of two dtypes
    parallel = parallel or ParallelConfig()
    pin(choose_fusions(parallel.kernels, on_cpu=trainable[0].device.type == "cpu", dtype=dtype))
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=FIRST_SCALE,
        min_loss_scale=LEAST_SCALE,
        loss_scale_window=RISES_AFTER,
        hysteresis=1,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return Optimization(policy, optimizer_config, optim, total_steps)


def check_schedule(optim: OptimConfig, lr: float, total_steps: int) -> None:
    """Raise ValueError for a stage's settings out of range."""
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 <= optim.warmup_fraction <= 1:
        raise ValueError(f"optim.warmup_fraction={optim.warmup_fraction}: choose a share between 0 and 1")
    if not 0 <= optim.min_lr <= lr:
        raise ValueError(f"optim.min_lr={optim.min_lr} lies outside 0 … the stage's learning rate {lr}")
    if total_steps < 1:
        raise ValueError(f"a stage has steps={total_steps}: it needs at least one")
