"""Who does the parts of a job: this process, workers of Ray, or the processes that torchrun started."""

from __future__ import annotations

import io
import logging
import os
import pickle
import socket
import warnings
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.spread import is_spread
from heedful.core.asked import require_fields
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.files import scratch
from heedful.core.fitted import compact
from heedful.core.ranges import PositiveFloat, PositiveInt

Read = Callable[[Any], Any]  # of one shard, or whatever else is shared: what it gives, at once or one by one
Pieces = Generator[Any, None, None]  # closed, it lets the workers go

ALIGNED = 64  # bytes; a multiple of so many is where each piece of what is sent begins


class Workers(ABC):
    """Whoever reads shards, or does other parts of a job that can be sent."""

    @abstractmethod
    def each(self, read: Read, shards: Sequence[Any]) -> Pieces:
        """What `read` gives for each shard, in the order of the shards, whoever is done first.

        What it gives one by one comes so where this process reads, and else all at once.
        """

    def together(self, whole: Callable[[], Any], read: Read) -> Any:
        """What `whole` gives, which may ask for `each`; in every process that takes part."""
        return whole()


@dataclass(frozen=True)
class Here(Workers):
    """This process, one shard after the other."""

    def each(self, read: Read, shards: Sequence[Any]) -> Pieces:
        for shard in shards:
            found = read(shard)
            with closing(found) if isinstance(found, Generator) else nullcontext():
                yield found


@dataclass(frozen=True)
class Ray(Workers):
    """Workers of Ray Data, each with the model: on this machine, or on a cluster by its address."""

    workers: PositiveInt = 2
    address: str = ""  # of a cluster that runs already, or "auto" for the one here; else one is started and stopped
    cpus: PositiveFloat = 1.0  # of each worker, which computes with as many threads

    def __post_init__(self) -> None:
        require_fields(self)

    def each(self, read: Read, shards: Sequence[Any]) -> Pieces:
        if not shards:
            return
        with self._cluster() as ray, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, of its own settings
            import ray.data as data

            logging.getLogger("ray.data").setLevel(logging.ERROR)
            context = data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            context.execution_options.preserve_order = True
            rows = data.from_items([{"number": i} for i in range(len(shards))], override_num_blocks=len(shards))
            done = rows.map_batches(
                _Actor,
                batch_size=1,
                compute=data.ActorPoolStrategy(size=self.workers),
                num_cpus=self.cpus,
                fn_constructor_args=(ray.put((read, tuple(shards))), max(1, round(self.cpus))),
            )
            for row in done.iter_batches(batch_size=1, prefetch_batches=0):
                yield _opened(row["piece"][0])

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        """Ray, running: the caller's own, the one at the address, or one for this run alone."""
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of what is run here
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what fails is raised
            import ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            rule = "several workers need one more package: pip install 'heedful[scale]'"
            raise FieldError("diagnose()", "workers", self, rule, None) from error
        if ray.is_initialized():
            yield ray
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address:
            try:
                _knock(self.address)
                ray.init(address=self.address, **quiet)
            except (OSError, OverflowError, ValueError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                rule = f"no cluster answers there ({reason}); start one with `ray start --head`, or leave it out"
                raise FieldError(self, "address", self.address, rule, "auto") from error
            try:
                yield ray
            finally:
                ray.shutdown()
            return
        with scratch("heedful-ray") as home:
            try:
                ray.init(
                    num_cpus=ceil(self.workers * self.cpus),
                    include_dashboard=False,
                    _temp_dir=str(home),
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
                yield ray
            finally:
                ray.shutdown()


def _knock(address: str) -> None:
    """Ray asks a place where nobody listens for minutes, and this one a few seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Actor:
    """A worker of Ray: it holds the model, and reads the shards whose numbers it is told."""

    def __init__(self, work: Any, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self.read, self.shards = ray.get(work) if isinstance(work, ray.ObjectRef) else work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"piece": [_closed(self.read, self.shards[int(i)]) for i in batch["number"]]}


@dataclass(eq=False)
class Ranks(Workers):
    """The processes of torch.distributed, as torchrun and accelerate start them; each calls `diagnose` alike.

    The first one leads: it says which shards are next, adds up what comes back, and alone writes to `out`.
    """

    _group: Any = field(default=None, init=False, repr=False)  # one that takes objects, which NCCL's does not

    def each(self, read: Read, shards: Sequence[Any]) -> Pieces:
        import torch.distributed as dist

        self._told(("shards", tuple(shards)))
        for start in range(0, len(shards), dist.get_world_size()):
            self._told(("read", start))
            found = self._gathered(_closed(read, shards[start]))
            yield from map(_opened, found[: len(shards) - start])

    def together(self, whole: Callable[[], Any], read: Read) -> Any:
        import torch.distributed as dist

        if not dist.is_initialized():
            rule = "torch.distributed is not initialised: start the script with torchrun, and call init_process_group()"
            raise FieldError("diagnose()", "workers", self, rule, 2)
        self._group = dist.new_group(backend="gloo")
        try:
            return self._lead(whole) if dist.get_rank() == 0 else self._follow(read)
        finally:
            dist.destroy_process_group(self._group)

    def _lead(self, whole: Callable[[], Any]) -> Any:
        try:
            found = whole()
        except BaseException as error:
            known = isinstance(error, HeedfulError)
            self._told(("failed", error if known else HeedfulError(f"the process that leads was stopped by {error!r}")))
            raise
        self._told(("done", found))
        return found

    def _follow(self, read: Read) -> Any:
        import torch.distributed as dist

        shards: Sequence[Any] = ()
        while True:
            word, what = self._told(None)
            if word == "done":
                return what
            if word == "failed":
                raise what
            if word == "shards":
                shards = what
            else:
                number = what + dist.get_rank()
                self._gathered(_closed(read, shards[number]) if number < len(shards) else b"")

    def _told(self, word: Any) -> Any:
        """What the first process says to all."""
        import torch.distributed as dist

        said = [packed(word)]
        dist.broadcast_object_list(said, 0, self._group)
        return opened(said[0])

    def _gathered(self, content: bytes) -> list[bytes]:
        """What all hand to the first process."""
        import torch.distributed as dist

        found: Any = [b""] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(content, found, 0, self._group)
        return found or []


def _closed(read: Read, shard: Any) -> bytes:
    """What a shard gave, or why it gave nothing, to be sent."""
    try:
        found = read(shard)
        return packed(tuple(found) if isinstance(found, Generator) else found)
    except HeedfulError as error:
        return packed(error)


class _Packer(pickle.Pickler):
    """Sends a tensor as bytes beside the rest, which are read where they lie; what is alike in it once."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        few = compact(value.detach().cpu())
        numbers = pickle.PickleBuffer(few.reshape(-1).view(torch.uint8).numpy().data)
        return _laid, (numbers, few.dtype, value.dtype, tuple(value.shape), few.expand(value.shape).stride())


def _laid(numbers: Any, few: torch.dtype, kind: torch.dtype, shape: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    row = torch.frombuffer(numbers, dtype=few) if len(numbers) else torch.empty(0, dtype=few)
    return row.to(kind).as_strided(shape, steps)


def packed(value: Any) -> bytes:
    """What goes from one of our own processes to another: lengths of pieces, and these, tensors' numbers at the end."""
    out, numbers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Packer(out, pickle.HIGHEST_PROTOCOL, buffer_callback=numbers.append).dump(value)
    pieces: list[bytes | memoryview] = [out.getvalue(), *(x.raw() for x in numbers)]
    lengths = array("q", [len(pieces), *map(len, pieces)]).tobytes()
    return b"".join(x for piece in (lengths, *pieces) for x in (piece, bytes(-len(piece) % ALIGNED)))


def opened(content: bytes) -> Any:
    """What was packed; its tensors lie in what was sent, which nobody writes to."""
    whole = memoryview(content)
    head = 8 + 8 * whole[:8].cast("q")[0]
    lengths = whole[8:head].cast("q")
    starts = accumulate(n + -n % ALIGNED for n in (head, *lengths[:-1]))
    rest, *numbers = (whole[start : start + n] for start, n in zip(starts, lengths, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that what was sent cannot be written to
        return pickle.loads(rest, buffers=numbers)


def _opened(content: bytes) -> Any:
    found = opened(content)
    if isinstance(found, HeedfulError):
        raise found
    return found


def as_workers(asked: int | Workers | None, model: nn.Module, verb: str) -> Workers:
    """So many workers of Ray, those that are named, or this process."""
    if asked is not None and is_spread(model):
        rule = "work on something else each, and these weights are spread over processes that must do the same"
        raise FieldError(verb, "workers", asked, rule, None)
    return Ray(asked) if isinstance(asked, int) else asked or Here()
