"""One stage's optimizer: gradient buffers, AdamW and the learning-rate schedule, on Megatron-Core."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import nn

from megatron_avatar.config.schema import OptimConfig

SCHEDULES = ("constant", "linear", "cosine")


class Optimization:
    """The wrapped policy, its optimizer and its schedule: what a stage builds afresh and drops at its end.

    `model` is what the pipeline schedule runs: Megatron's data-parallel wrapper, whose fp32 buffers collect the
    gradients of every trainable parameter. `lr` is the rate of the latest update, `skipped` counts the updates refused
    for non-finite gradients.
    """

    def __init__(self, policy: nn.Module, optimizer_config: OptimizerConfig, schedule: dict[str, Any]) -> None:
        config = get_model_config(policy)
        # Sharding the moments over data-parallel ranks would be switched on here and in OptimizerConfig
        # (use_distributed_optimizer); over torch's AdamW, Megatron-Core 0.16 restores its state wrongly.
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, buffers, policy)
        config.finalize_model_grads_func = finalize_model_grads
        self._optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self._scheduler = OptimizerParamScheduler(self._optimizer, **schedule)
        self._scheduler.step(1)  # update k = 1, 2, … uses the schedule's point k: no update at a rate of zero
        self._complete_state()
        self.lr = 0.0
        self.skipped = 0

    def zero_grad(self) -> None:
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self) -> tuple[float, bool]:
        """Clip the gradients and update the weights: (norm before clipping, whether the update was skipped).

        Gradients must have been reduced over the ranks, which the pipeline schedule does. A norm that is not finite
        skips the update on every rank alike; the schedule advances all the same.
        """
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        finite = math.isfinite(norm)
        if finite:
            for part in self._optimizer.chained_optimizers:
                if part.config.clip_grad > 0 and part.get_parameters():
                    clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
            self._optimizer.step_with_ready_grads()
        self.lr = self._groups[0]["lr"]
        self.skipped += not finite
        self._scheduler.step(1)
        return norm, not finite

    def sharded_state_dict(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """State for Megatron's distributed checkpoint, sharded like `model_state` (the policy's sharded_state_dict)."""
        return {
            "optimizer": self._optimizer.sharded_state_dict(model_state),
            "schedule": {"points": self._scheduler.num_steps, "skipped": self.skipped},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint returned for `sharded_state_dict`; settings stay as configured now."""
        settings = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in self._groups]
        if USING_PYTORCH_OPTIMIZER:  # Megatron-Core leaves the step out of a state without any update
            adamw = state["optimizer"].get("optimizer", state["optimizer"])  # bf16 has master weights beside it
            adamw["state"].setdefault("common_step", torch.tensor(0.0))
        self._optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self._groups, settings, strict=True):
            group.update(own)
        self._scheduler.num_steps = state["schedule"]["points"]
        self._scheduler.step(0)
        self.skipped = state["schedule"]["skipped"]

    def close(self) -> None:
        """Free the gradient buffers and moments; the policy can then be wrapped for the next stage."""
        for parameter in self.model.params_with_grad:
            parameter.grad = None
            for attribute in ("main_grad", "main_param"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)
        self.model.grad_accs.clear()  # the hooks that fill the buffers go with their accumulators
        del self.model, self._optimizer, self._scheduler

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _complete_state(self) -> None:
        """Give every parameter its moments and step before the first update, so that any checkpoint can be loaded."""
        for part in self._optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            part.init_state_fn(part.optimizer, part.config)
            if USING_PYTORCH_OPTIMIZER:
                for state in part.optimizer.state.values():
                    state.setdefault("step", torch.tensor(0.0))


def build_optimizer(
    policy: nn.Module, optim: OptimConfig, *, lr: float, total_steps: int
) -> Optimization:
    """Wrap `policy` and build AdamW for its trainable parameters; call again, after `close`, at every stage.

    The rate rises linearly over the first `optim.warmup_fraction` of `total_steps` to `lr`, then stays or falls to
    `optim.min_lr`. Biases and norms are exempt from weight decay. Raises ValueError for settings out of range.
    """
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 <= optim.warmup_fraction <= 1:
        raise ValueError(f"optim.warmup_fraction={optim.warmup_fraction}: choose a share between 0 and 1")
    if not 0 <= optim.min_lr <= lr:
        raise ValueError(f"optim.min_lr={optim.min_lr} lies outside 0 … the stage's learning rate {lr}")
    if total_steps < 1:
        raise ValueError(f"a stage has steps={total_steps}: it needs at least one")
    trainable = [p for p in policy.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the policy is trainable: nothing to optimize")
    (dtype,) = {p.dtype for p in trainable}  # Megatron-Core mixes up the moments of a model of two dtypes
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
        params_dtype=dtype,
    )
    schedule = {
        "init_lr": 0.0,
        "max_lr": lr,
        "min_lr": optim.min_lr,
        "lr_warmup_steps": round(optim.warmup_fraction * total_steps),
        "lr_decay_steps": total_steps + 1,  # the last update still learns
        "lr_decay_style": optim.schedule,
        "start_wd": optim.weight_decay,
        "end_wd": optim.weight_decay,
        "wd_incr_steps": total_steps,
        "wd_incr_style": "constant",
    }
    return Optimization(policy, optimizer_config, schedule)
