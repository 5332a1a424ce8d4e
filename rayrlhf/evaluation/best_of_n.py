"""Best-of-n from N samples: unbiased estimates, its KL, and the shapes of Gao et al. 2022.

Source: arXiv:2210.10760; the estimator is that of WebGPT, arXiv:2112.09332.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def kl_of_best_of_n(n: int) -> float:
    """Return KL(best-of-n || one sample) in nats: log n - (n - 1) / n.

    An upper bound, close where no sample is likely to come twice (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(proxy: Floats, n: int) -> Floats:
    """Return (N,) the chance of each of N samples to be the best of n drawn ones by `proxy` (N,).

    The draw is without replacement; equal samples are equally likely to be taken. A dot product
    with any values (N,) is the unbiased estimate of that value of the best of n.
    """
    num = len(proxy)
    if not 1 <= n <= num:
        raise ValueError(f"best of n={n} of {num} samples: n is from 1 to the number of samples")
    below = np.array([math.comb(rank, n - 1) / math.comb(num, n) for rank in range(num)])
    weights = np.empty(num)
    weights[np.argsort(proxy, kind="stable")] = below
    _, group = np.unique(proxy, return_inverse=True)
    means: Floats = (np.bincount(group, weights) / np.bincount(group))[group]
    return means


def best_of_n(proxy: Floats, values: Floats, n: int) -> Floats:
    """Return (P,) the expected value of the best of n by `proxy`, both (P, N)."""
    return np.array(
        [best_of_n_weights(p, n) @ v for p, v in zip(proxy, values, strict=True)], dtype=np.float64
    )


def powers_of_two(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of samples."""
    return [2**power for power in range(num_samples.bit_length())]


def fit(distances: Sequence[float], gold: Sequence[float], *, log: bool) -> dict[str, float] | None:
    """Fit the gold reward over d = sqrt(KL): d (alpha - beta d), with `log` d (alpha - beta log d).

    Least squares; the first shape is best-of-n's, the second RL's (arXiv:2210.10760, section 1).
    None with fewer than three distances above 0.
    """
    d, reward = (np.array(side, dtype=np.float64) for side in (distances, gold))
    d, reward = d[d > 0], reward[d > 0]
    if len(np.unique(d)) < 3:
        return None
    columns = np.stack([d, -d * (np.log(d) if log else d)], axis=1)
    alpha, beta = np.linalg.lstsq(columns, reward)[0]
    return {"alpha": float(alpha), "beta": float(beta)}
