"""The output layer, and the log-probs and entropies of its logits.

The reduction over V runs in float32 over blocks of rows, and its gradient overwrites the logits: of
the (tokens, V) tensor there is one copy, where `log_softmax` has three. On a CPU a block fits the
cache, which makes the reduction about twice as fast; on a GPU a compiled kernel does a block in one
pass over the logits. The entropy is a metric, without gradient.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rayrlhf.models.execution import has_compiler

LOGITS_BYTES = 2**29
"""Logits (n, V) in float32 up to this size are kept for the backward pass; larger ones are never
held: computed for so many tokens at a time, and once more in the backward pass."""


class OutputHead(nn.Module):
    """The output layer, and what is computed from its logits, in one call of a module.

    ZeRO-3 gathers the weight once per call, on all ranks together: these make as many calls, in
    however many parts each computes its logits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(
        self,
        states: Tensor,
        tokens: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Any:
        """Return the logits of `states`; with tokens (n,), their log-probs and the entropies."""
        if tokens is None:
            return F.linear(states, self.weight, self.bias)

        def statistics(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(states, self.weight, self.bias)  # (n, V)
            return _SelectLogProbs.apply(logits, tokens, temperature, with_entropy)

        rows = max(1, LOGITS_BYTES // (4 * self.weight.shape[0]))
        if len(states) <= rows:
            return statistics(states, tokens)
        parts = [
            checkpoint(statistics, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(states.split(rows), tokens.split(rows), strict=True)
        ]
        return tuple(torch.cat(found) for found in zip(*parts, strict=True))


class _SelectLogProbs(torch.autograd.Function):
    """(n, V) logits and (n,) tokens -> (n,) log-probs and entropies, float32.

    Backward overwrites the logits with their gradient; nobody else may hold them. A second
    backward through the same graph is an error, since autograd sees that they changed.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_norm = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)  # (n,)
        entropies = torch.zeros_like(log_norm)
        reduce = _kernel(_normalise, logits.device)
        for rows in _blocks(logits):
            log_norm[rows], entropies[rows] = reduce(logits[rows], temperature, with_entropy)
        ctx.save_for_backward(logits, tokens, log_norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return _chosen(logits, tokens, temperature) - log_norm, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, log_norm = ctx.saved_tensors
        grad = grad / ctx.temperature  # (n,)
        # d log p(token) / d logits = onehot(token) - p
        probs = (_chosen(logits, tokens, ctx.temperature) - log_norm).exp()
        of_token = (grad - grad * probs).to(logits.dtype)
        differentiate = _kernel(_overwrite, logits.device)
        for rows in _blocks(logits):
            differentiate(logits[rows], log_norm[rows], grad[rows], ctx.temperature)
        return logits.scatter_(1, tokens.unsqueeze(1), of_token.unsqueeze(1)), None, None, None


def _chosen(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the logits of the tokens (n,) over temperature, float32."""
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1).float() / temperature


def _normalise(logits: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Return log Z and the entropies (0 unless asked for) of logits (n, V)."""
    scaled = logits.float() / temperature
    log_norm = torch.logsumexp(scaled, dim=1)
    if not with_entropy:
        return log_norm, torch.zeros_like(log_norm)
    probs = (scaled - log_norm[:, None]).exp_()
    return log_norm, log_norm - probs.mul_(scaled).sum(dim=1)  # H = log Z - E[logit]


def _overwrite(logits: Tensor, log_norm: Tensor, grad: Tensor, temperature: float) -> None:
    """Overwrite logits (n, V) with -grad * p."""
    probs = logits.float().div_(temperature).sub_(log_norm[:, None]).exp_()
    logits.copy_(probs.mul_(-grad[:, None]))


@cache
def _kernel(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return `function`, on a GPU as one kernel that touches the logits once."""
    fuses = device.type == "cuda" and has_compiler()
    return torch.compile(function) if fuses else function


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows: 1 MiB of float32 on a CPU, for its cache; few launches on a GPU."""
    elements = 2**18 if logits.device.type == "cpu" else 2**27
    rows = max(1, elements // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)
