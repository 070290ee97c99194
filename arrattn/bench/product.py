"""The machine's own rate of matrix products: what no attention can overtake."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from arrattn._core.threads import num_threads
from arrattn.bench.contestant import Contestant
from arrattn.bench.rounds import Clock

__all__ = ["Product", "blas", "find_product", "narrow", "one_blas_thread", "product_contestant"]

# Rows, inner and columns of one product: an attention's tiles, and squares. With a number before
# them, so many products in one call: small ones, which some BLAS does from where operands lie.
SHAPES = (
    (16, 64, 64, 240),
    (16, 64, 240, 64),
    (128, 64, 512),
    (256, 64, 1024),
    (256, 512, 64),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
)
BURST = 8e-3  # seconds of one burst
LEAST = 5e-2  # seconds of a turn: a short one meets the machine at a lucky or unlucky moment


class Product(NamedTuple):
    """
    The kind of matrix product that this machine does best.

    Attributes
    ----------
    shape : tuple of int
        Rows, inner and columns, and perhaps, before them, how many products one call does.
    repeats : int
        Products that each worker does in one burst.
    threads : int
        Workers, each with a BLAS of one thread.
    """

    shape: tuple[int, ...]
    repeats: int
    threads: int

    @property
    def operations(self) -> int:
        """Multiplications and additions in one burst."""
        return 2 * math.prod(self.shape) * self.repeats * self.threads


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """
    Hold NumPy's BLAS to one thread: its workers spin for long, and nobody here needs them.

    arrattn holds it so itself while it works, and the products of the plain NumPy peers are
    too small to gain by threads. The BLAS that torch brings along is left alone.
    """
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    paths = [library.filepath for library in found if "numpy" in library.filepath]
    chosen = ThreadpoolController().select(filepath=paths) if paths else None
    if chosen is None:
        yield
        return
    with chosen.limit(limits=1):
        yield


def blas() -> str:
    """
    Name NumPy's BLAS.

    Returns
    -------
    str
        Its kind, version and the processor it is made for, as far as they are known.
    """
    libraries = ThreadpoolController().select(user_api="blas").info()
    for library in libraries:
        if "numpy" in library["filepath"] or len(libraries) == 1:
            parts = (library.get(key) for key in ("internal_api", "version", "architecture"))
            return " ".join(str(part) for part in parts if part)
    named = np.show_config(mode="dicts")
    return str(named["Build Dependencies"]["blas"]["name"])


def narrow(name: str) -> bool:
    """
    Say whether OpenBLAS leaves a processor's widest instructions unused.

    It goes by the processors that it knows; of a newer one it takes what an older one can.

    Parameters
    ----------
    name : str
        What `blas` gives.

    Returns
    -------
    bool
        True for kernels of AVX2 on a processor that NumPy sees AVX-512 on.
    """
    simd: Any = np.show_config(mode="dicts").get("SIMD Extensions", {})
    wide = any(x.startswith(("AVX512", "X86_V4")) for x in simd.get("found", []))
    return wide and name.startswith("openblas") and name.endswith((" Haswell", " Zen"))


def find_product(clock: Clock = time.perf_counter) -> Product:
    """
    Find the shape of product with the highest rate.

    Parameters
    ----------
    clock : callable
        Seconds, from any start.

    Returns
    -------
    Product
        The best of a handful, with as many repeats as fill a burst.
    """
    threads = num_threads()
    best, rate = Product(SHAPES[0], 1, threads), 0.0
    for shape in SHAPES:
        one = Product(shape, 1, threads)
        seconds = _time(one, clock)
        repeats = max(1, round(BURST / max(seconds, 1e-7)))
        product = one._replace(repeats=repeats)
        found = product.operations / max(_time(product, clock), 1e-9)
        if found > rate:
            best, rate = product, found
    return best


def product_contestant(product: Product, operations: int) -> Contestant:
    """
    Matrix products as one who takes turns: the time they need for so many operations.

    Parameters
    ----------
    product : Product
        From `find_product`.
    operations : int
        Of the attention that it is compared with.

    Returns
    -------
    Contestant
        Its factor brings a burst's time to that of the operations.
    """
    factor = operations / product.operations
    return Contestant("matrix product", _Burst(product), factor=factor, least=LEAST)


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="arrattn-product")


class _Burst:
    """All workers at once, each with operands of its own, made once."""

    def __init__(self, product: Product) -> None:
        *many, rows, inner, columns = product.shape
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32)

        self.repeats = product.repeats
        self.pool = _pool(product.threads)
        self.operands = [
            (draw(*many, rows, inner), draw(inner, columns), draw(*many, rows, columns))
            for _ in range(product.threads)
        ]

    def __call__(self) -> None:
        list(self.pool.map(self._work, self.operands))

    def _work(self, operands: Any) -> None:
        a, b, out = operands
        for _ in range(self.repeats):
            np.matmul(a, b, out=out)


def _time(product: Product, clock: Clock) -> float:
    """The fastest of a few bursts: the rate that the machine is capable of."""
    burst = _Burst(product)
    burst()
    times = []
    for _ in range(3):
        start = clock()
        burst()
        times.append(clock() - start)
    return min(times)
