"""How long the linear algebra takes, beside the way it is published, interleaved in one run.

    python -m benchmarks.factorization --out results.json

(a) whole model: the data-aware SVD of every matrix of a 30-layer model with the shapes of SmolLM2-135M, at
80% of the
    parameters. "direct" is the published recipe per matrix (float64 Cholesky of the Gram matrix with a jitter
    retry, explicit inverse, float32 SVD of W S); "direct-shared" does the Cholesky and the inverse once per
    input; "double" and "mixed" are `corank.linalg.truncate` in its two precisions.
(b) fast CUR: columns and rows by a sketch and LU pivots and one least-squares solve, beside a full SVD with
Q-DEIM.

"wall" is the clock, "cpu" the processor time of the process: on a busy machine only the latter, with
--threads 1, compares routes fairly. Speed-ups are medians over layers. The losses are realised losses in
float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from corank.linalg import link, project_left, select, truncate

HIDDEN, KEY, FFN = 576, 192, 1536
GROUPS: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = (
    (HIDDEN, (("q", HIDDEN), ("k", KEY), ("v", KEY))),
    (HIDDEN, (("o", HIDDEN),)),
    (HIDDEN, (("gate", FFN), ("up", FFN))),
    (FFN, (("down", HIDDEN),)),
)
Pairs = dict[str, tuple[Tensor, Tensor]]
Layer = list[tuple[Tensor, dict[str, Tensor]]]


def make_layer(seed: int, tokens: int) -> Layer:
    """A float64 Gram matrix and its float32 weights per group: correlated inputs, one loud channel."""
    g = torch.Generator().manual_seed(seed)
    layer: Layer = []
    for n, matrices in GROUPS:
        scale = torch.arange(1, n + 1) ** -0.5
        mix = torch.randn(n, n, generator=g) / n**0.5
        X = (torch.randn(tokens, n, generator=g) * scale) @ mix
        X[:, n // 3] *= 20.0
        X += 0.3 * X.std() * torch.randn(n, generator=g)
        G = X.double().T @ X.double() / tokens
        layer.append((G, {name: torch.randn(m, n, generator=g) / n**0.5 for name, m in matrices}))
    return layer


def rank_of(W: Tensor, keep: float) -> int:
    m, n = W.shape
    return int(keep * m * n / (m + n))


def cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """The published root: float64 Cholesky, one retry lifted above the lowest eigenvalue."""
    L, info = torch.linalg.cholesky_ex(G)
    if int(info):
        lift = 1e-6 - float(torch.linalg.eigvalsh(G)[0])
        L = torch.linalg.cholesky(G + lift * torch.eye(len(G), dtype=G.dtype))
    S = L.float()
    return S, torch.linalg.inv(S)


def direct(layer: Layer, keep: float, shared: bool) -> Pairs:
    pairs: Pairs = {}
    for G, matrices in layer:
        root = cholesky(G) if shared else None
        for name, W in matrices.items():
            S, inverse = root or cholesky(G)
            k = rank_of(W, keep)
            U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
            half = sigma[:k].sqrt()
            pairs[name] = (U[:, :k] * half, half[:, None] * (Vh[:k] @ inverse))
    return pairs


def ours(layer: Layer, keep: float, precision: str) -> Pairs:
    pairs: Pairs = {}
    for G, matrices in layer:
        for name, W in matrices.items():
            k = rank_of(W, keep)
            pairs[name] = truncate(W, G, rank=k, precision=precision).pair(W, k)
    return pairs


ROUTES: dict[str, Callable[[Layer, float], Pairs]] = {
    "direct": lambda layer, keep: direct(layer, keep, shared=False),
    "direct-shared": lambda layer, keep: direct(layer, keep, shared=True),
    "double": lambda layer, keep: ours(layer, keep, "double"),
    "mixed": lambda layer, keep: ours(layer, keep, "mixed"),
}


def realised(layer: Layer, pairs: Pairs) -> dict[str, float]:
    losses = {}
    for G, matrices in layer:
        for name, W in matrices.items():
            B, A = pairs[name]
            D = W.double() - B.double() @ A.double()
            losses[name] = float((D @ G * D).sum())
    return losses


def breakdown(route: Callable[[Layer, float], Pairs], layer: Layer, keep: float) -> dict[str, float]:
    """Share of the time by kind of operation, from the profiler, for one layer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        route(layer, keep)
    kinds = {
        "svd": "svd",
        "eigh": "eigh",
        "cholesky": "cholesky",
        "solve_triangular": "triangular solve",
        "triangular_solve": "triangular solve",
        "inv": "inverse",
        "lu_": "inverse",
        "linalg_solve": "inverse",
        "qr": "qr",
        "geqrf": "qr",
        "orgqr": "qr",
        "householder": "qr",
        "mm": "matrix products",
        "matmul": "matrix products",
    }
    shares: dict[str, float] = {}
    for event in profile.key_averages():
        kind = next((label for key, label in kinds.items() if key in event.key), "other")
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(t / total, 3) for kind, t in sorted(shares.items(), key=lambda item: -item[1])}


def speedup(reference: list[float], mine: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(reference, mine, strict=True))


def whole_model(layers: int, keep: float, tokens: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {name: [] for name in ROUTES}
    cpu: dict[str, list[float]] = {name: [] for name in ROUTES}
    losses: dict[str, list[float]] = {name: [] for name in ROUTES}
    for warm in ROUTES.values():
        warm(make_layer(0, tokens), keep)
    names = list(ROUTES)
    for index in range(layers):
        layer = make_layer(index + 1, tokens)
        for name in names[index % len(names) :] + names[: index % len(names)]:  # nobody always goes first
            start, burnt = time.perf_counter(), time.process_time()
            pairs = ROUTES[name](layer, keep)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - burnt)
            losses[name] += realised(layer, pairs).values()
    layer = make_layer(1, tokens)
    rows = {}
    for name in ROUTES:
        rows[name] = {
            "wall_seconds": sum(wall[name]),
            "cpu_seconds": sum(cpu[name]),
            "fastest_layer_wall_seconds": min(wall[name]),
            "wall_speedup": speedup(wall["direct"], wall[name]),
            "cpu_speedup": speedup(cpu["direct"], cpu[name]),
            "wall_speedup_over_shared": speedup(wall["direct-shared"], wall[name]),
            "cpu_speedup_over_shared": speedup(cpu["direct-shared"], cpu[name]),
            "loss_over_optimum": sum(losses[name]) / sum(losses["double"]),
            "worst_matrix_loss_over_optimum": max(a / b for a, b in zip(losses[name], losses["double"], strict=True)),
            "time_share": breakdown(ROUTES[name], layer, keep),
        }
    return {"layers": layers, "matrices": layers * 7, "keep": keep, "tokens": tokens, "routes": rows}


def decaying_matrix(m: int, n: int, rate: float, seed: int) -> Tensor:
    """Singular values close to i^-rate, a noise floor, and channels of log-normal loudness (float32)."""
    g = torch.Generator().manual_seed(seed)
    inner = min(m, n) // 4
    left = torch.randn(m, inner, generator=g) * torch.arange(1, inner + 1) ** -rate
    A = left @ (torch.randn(inner, n, generator=g) / n**0.5)
    A += 1e-3 * A.std() * torch.randn(m, n, generator=g)
    return A * torch.exp(0.5 * torch.randn(n, generator=g))


def relative_error(A: Tensor, left: Tensor, right: Tensor) -> float:
    squares, step = 0.0, 512
    for i in range(0, len(A), step):
        squares += float((A[i : i + step] - left[i : i + step] @ right).double().square().sum())
    return (squares / float(A.double().square().sum())) ** 0.5


def cur_by_svd(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return select(A, r, "qdeim", axis=0, basis=U[:, :r]), select(A, r, "qdeim", basis=Vh[:r].T)


def cur_by_gram(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return select(A, r, "qdeim", axis=0), select(A, r, "qdeim")


def cur_by_sketch(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    J = select(A, r, "sketch")
    C = A[:, J]
    return select(C, r, "deim", axis=0, basis=C), J


def fast_cur(m: int, n: int, r: int, rate: float) -> dict[str, Any]:
    A = decaying_matrix(m, n, rate, seed=0)
    rows: dict[str, dict[str, float]] = {}
    routes = {"full SVD + Q-DEIM": cur_by_svd, "Gram eigh + Q-DEIM": cur_by_gram, "cur-fast": cur_by_sketch}
    for name, route in routes.items():
        start = time.perf_counter()
        I, J = route(A, r)
        chosen = time.perf_counter()
        C, R = A[:, J], A[I]
        T = project_left(C, A)
        column = time.perf_counter()
        M = link(C, A, R)
        cur = time.perf_counter()
        rows[name] = {
            "select_seconds": chosen - start,
            "column_id_seconds": column - start,
            "cur_seconds": cur - column + chosen - start,
            "column_id_error": relative_error(A, C, T),
            "cur_error": relative_error(A, (C.double() @ M.double()).float(), R),
        }
    reference = rows["full SVD + Q-DEIM"]
    for row in rows.values():
        for key in ("column_id", "cur"):
            row[f"{key}_speedup"] = reference[f"{key}_seconds"] / row[f"{key}_seconds"]
            row[f"{key}_error_ratio"] = row[f"{key}_error"] / reference[f"{key}_error"]
    return {"shape": [m, n], "rank": r, "decay": rate, "routes": rows}


def show(result: dict[str, Any]) -> None:
    console = Console()
    if model := result.get("whole_model"):
        table = Table(title=f"svd-llm factorization, {model['matrices']} matrices, keep {model['keep']}")
        for column in (
            "route",
            "wall s",
            "x",
            "cpu s",
            "x",
            "loss / optimum",
            "worst",
            "where the time goes",
        ):
            table.add_column(column)
        for name, row in model["routes"].items():
            share = ", ".join(f"{kind} {part:.0%}" for kind, part in row["time_share"].items() if part >= 0.03)
            table.add_row(
                name,
                f"{row['wall_seconds']:.1f}",
                f"{row['wall_speedup']:.2f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['cpu_speedup']:.2f}",
                f"{row['loss_over_optimum']:.6f}",
                f"{row['worst_matrix_loss_over_optimum']:.6f}",
                share,
            )
        console.print(table)
    if fast := result.get("fast_cur"):
        table = Table(title=f"rank-{fast['rank']} columns and rows of a {fast['shape'][0]} x {fast['shape'][1]} matrix")
        for column in (
            "route",
            "column ID s",
            "speedup",
            "error / exact",
            "CUR s",
            "speedup",
            "error / exact",
        ):
            table.add_column(column)
        for name, row in fast["routes"].items():
            cells = [
                f"{row[f'{key}_{what}']:.3g}"
                for key in ("column_id", "cur")
                for what in ("seconds", "speedup", "error_ratio")
            ]
            table.add_row(name, *cells)
        console.print(table)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "model", "cur"), default="all")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=4096, help="rows behind each Gram matrix")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), help="of the matrix in part cur")
    parser.add_argument("--rank", type=int, default=256, help="columns and rows in part cur")
    parser.add_argument("--decay", type=float, default=0.8, help="singular values fall like i^-decay in part cur")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "factorization",
        "hardware": cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    if options.part in ("all", "model"):
        result["whole_model"] = whole_model(options.layers, options.keep, options.tokens)
    if options.part in ("all", "cur"):
        result["fast_cur"] = fast_cur(*options.shape, options.rank, options.decay)
    show(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
