"""make_traced and execute: the two functions that users call."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import fx

from primexec import _torch, config
from primexec._torch_dynamo import capture_lock
from primexec.cache import Cache, CacheInfo, compile_captured, runs_inline
from primexec.capture import capture
from primexec.captured import Signature
from primexec.config import Executors, Options
from primexec.decisions import NOTHING, DecidedOtherwiseError
from primexec.errors import PrimexecError
from primexec.executors import registry
from primexec.explain import Explanation, explain
from primexec.guards import MISS
from primexec.program import Program

F = TypeVar("F", bound=Callable[..., Any])
_OVERRIDES = ("executor", "executor_parameters")
_is_dynamo_compiling = _torch.is_dynamo_compiling


class Traced:
    """A function that is traced at the first call of its kind and then served from a cache."""

    def __init__(self, fn: Callable[..., Any], options: Options, cache_size: int) -> None:
        registry.resolve(options, torch.device("cpu"))  # an unknown name is an error here, not at the first call
        self._fn = fn
        self._size = cache_size
        self._signature = Signature.of(fn)
        self._cache = Cache(self._signature, options, cache_size)
        self._others: dict[Options, Cache] = {}  # for calls that choose other executors
        self._overrides = tuple(set(_OVERRIDES) - _parameter_names(fn))
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo_compiling():
            return self._fn(*args, **{k: v for k, v in kwargs.items() if k not in self._overrides})
        if config.disabled():
            return self._fn(*args, **self._split(kwargs)[1])
        cache, known = self._cache, NOTHING
        try:
            for entry in cache.entries:
                out = entry.call(args, kwargs)
                if out is not MISS:
                    cache.hits += 1
                    if entry is not cache.entries[0]:
                        cache._promote(entry)
                    return out
        except DecidedOtherwiseError as error:
            known = error.known
        if kwargs:
            cache, kwargs = self._split(kwargs)
        return cache.call(self._fn, args, kwargs, known)

    def _split(self, kwargs: dict[str, Any]) -> tuple[Cache, dict[str, Any]]:
        """The cache for the executors chosen in this call, and the keyword arguments that are fn's own."""
        if not any(name in kwargs for name in self._overrides):
            return self._cache, kwargs
        own = {k: v for k, v in kwargs.items() if k not in self._overrides}
        base = self._cache.options
        options = Options.of(
            kwargs["executor"] if "executor" in self._overrides and "executor" in kwargs else base.executors,
            kwargs["executor_parameters"]
            if "executor_parameters" in self._overrides and "executor_parameters" in kwargs
            else dict(base.parameters),
        )
        if options == base:
            return self._cache, own
        registry.resolve(options, torch.device("cpu"))
        return self._others.setdefault(options, Cache(self._signature, options, self._size)), own

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Traced functions in a class body become methods; each instance has a cache of its own."""
        if instance is None:
            return self
        if not hasattr(instance, "__dict__"):
            raise TypeError(f"a traced method needs an instance with a __dict__; {type(instance).__name__} has none")
        methods = instance.__dict__.get("_primexec_methods")
        if methods is None:
            methods = _NotCopied()
            setter = type.__setattr__ if isinstance(instance, type) else object.__setattr__
            setter(instance, "_primexec_methods", methods)
        bound = methods.get(self)
        if bound is None or bound._fn.__self__ is not instance:  # a shallow copy has its original's methods
            bound = methods[self] = Traced(types.MethodType(self._fn, instance), self._cache.options, self._size)
        return bound

    def cache_info(self) -> CacheInfo:
        """Counts over all executors: hits, misses, traces, compiles, evictions, entries.

        >>> import torch, primexec
        >>> traced = primexec.make_traced(lambda x: x * 2)
        >>> _ = traced(torch.ones(3)), traced(torch.zeros(3))
        >>> traced.cache_info()
        CacheInfo(hits=1, misses=1, traces=1, compiles=1, evictions=0, entries=1)
        """
        infos = [c.info() for c in (self._cache, *self._others.values())]
        return CacheInfo(*(sum(counts) for counts in zip(*infos, strict=True)))

    def cache_clear(self) -> None:
        """Drop every program, and start counting anew."""
        self._cache.clear()
        self._others.clear()

    def trace(self, /, *args: Any, **kwargs: Any) -> Program:
        """The program for this call; nothing is run or cached.

        Raises:
            CaptureError: where the call cannot be captured soundly.
        """
        cache, kwargs = self._split(kwargs)
        if runs_inline(args, kwargs):
            raise PrimexecError("trace() was called inside another trace or transform")
        executors = registry.resolve(cache.options, torch.device("cpu"))
        with capture_lock():
            captured = capture(self._fn, args, kwargs, self._signature, registry.saving(cache.options, executors))
            captured, executable = compile_captured(captured, cache.options, executors)
            if executable.training is not None:
                executable.training.plan()  # the passes change its program
        return captured.program

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """Print, and return, the plan for this call and what differs from the nearest cached program.

        Raises:
            CaptureError: where the call cannot be captured soundly.
        """
        cache, kwargs = self._split(kwargs)
        explanation = explain(self._fn, cache, args, kwargs)
        print(explanation)
        return explanation

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return Traced(copy.deepcopy(self._fn, memo), self._cache.options, self._size)

    def __reduce__(self) -> str | tuple[Any, ...]:
        name: str = getattr(self, "__qualname__", "")
        if getattr(sys.modules.get(self.__module__), name, None) is self:
            return name  # a decorated function of a module is found by its name, as functions are
        return Traced, (self._fn, self._cache.options, self._size)

    def __repr__(self) -> str:
        return f"<traced {self._signature.name}>"


class TracedModule(torch.nn.Module):
    """A traced `nn.Module`: shares every attribute of the original, and runs its `__call__` traced.

    The two objects have one `__dict__`: parameters, buffers, hooks, `training` and plain attributes are the
    same, whichever of the two they are set on. `isinstance` and the methods of the original's class hold.
    """

    __slots__ = ("_primexec_traced",)
    primexec_class: type[torch.nn.Module]
    _primexec_traced: Traced

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The class made for a module is none of the user's: their registries need not hear of it."""

    def __init__(self) -> None:
        raise TypeError("make a traced module with primexec.make_traced(module)")

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _SLOT.__get__(self)(*args, **kwargs)  # in a trace a shadow, which has none, answers for the module

    def cache_info(self) -> CacheInfo:
        """As `Traced.cache_info`."""
        return _traced(self).cache_info()

    def cache_clear(self) -> None:
        """As `Traced.cache_clear`."""
        _traced(self).cache_clear()

    def trace(self, /, *args: Any, **kwargs: Any) -> Program:
        """As `Traced.trace`."""
        return _traced(self).trace(*args, **kwargs)

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """As `Traced.explain`."""
        return _traced(self).explain(*args, **kwargs)

    def __copy__(self) -> torch.nn.Module:
        traced = self._primexec_traced
        return _trace_module(Traced(copy.copy(traced._fn), traced._cache.options, traced._size))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Module:
        return _trace_module(copy.deepcopy(self._primexec_traced))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _trace_module, (self._primexec_traced,)


def _traced(module: TracedModule) -> Traced:
    traced: Traced = _SLOT.__get__(module)
    return traced


def _trace_module(traced: Traced) -> torch.nn.Module:
    module: Any = traced._fn
    name = f"Traced{type(module).__name__}"
    body = {"__slots__": (), "__module__": type(module).__module__, "primexec_class": type(module)}
    shared: Any = object.__new__(type(name, (TracedModule, type(module)), body))
    object.__setattr__(shared, "__dict__", module.__dict__)
    _SLOT.__set__(shared, traced)
    return shared  # type: ignore[no-any-return]


_SLOT: Any = TracedModule.__dict__["_primexec_traced"]


@overload
def make_traced(
    fn: F, *, executor: Executors = ..., executor_parameters: Mapping[str, object] | None = ..., cache_size: int = ...
) -> F: ...
@overload
def make_traced(
    fn: None = None,
    *,
    executor: Executors = ...,
    executor_parameters: Mapping[str, object] | None = ...,
    cache_size: int = ...,
) -> Callable[[F], F]: ...
def make_traced(
    fn: Any = None,
    *,
    executor: Executors = "auto",
    executor_parameters: Mapping[str, object] | None = None,
    cache_size: int = 64,
) -> Any:
    """Trace a function or module once for each kind of call, and run the trace from then on.

    Args:
        fn: any callable: function, lambda, bound method, `functools.partial`, callable object or `nn.Module`;
            or a `torch.export.ExportedProgram`. Of a module comes back a module that shares the original's state,
            of an exported program a module that shares the program's. Without fn, a decorator.
        executor: a name, or names in order of priority; "auto" is the best one for the inputs' device.
        executor_parameters: options of the executors; `{"strict": True}` forbids falling back to `aten`;
            `{"save": "less"}` computes cheap values again in backward rather than save them, as is done unasked
            where an executor fuses ("default" and "more" save what eager saves).
        cache_size: how many programs are kept; the least recently used one goes first.

    Returns:
        A callable with fn's signature, which also takes `executor=` and `executor_parameters=` where fn has
        no parameters of these names. Arguments may hold tensors in any pytree, and plain values, which the
        program is specialised to.

    Raises:
        ValueError: for an unknown executor or executor parameter.
        CaptureError: at a call that cannot be captured soundly.

    >>> import torch, primexec
    >>> @primexec.make_traced
    ... def scale(x, factor=2.0):
    ...     return x * factor
    >>> scale(torch.ones(2))
    tensor([2., 2.])
    """
    if fn is None:
        return functools.partial(
            make_traced, executor=executor, executor_parameters=executor_parameters, cache_size=cache_size
        )
    if isinstance(fn, torch.export.ExportedProgram):
        fn = fn.module()
    if not callable(fn):
        raise TypeError(f"make_traced takes a callable, got {type(fn).__qualname__}")
    if isinstance(fn, TracedModule):
        fn = fn._primexec_traced._fn
    elif isinstance(fn, Traced):
        fn = fn._fn
    traced = Traced(fn, Options.of(executor, executor_parameters), cache_size)
    return _trace_module(traced) if isinstance(fn, torch.nn.Module) else traced


def execute(
    gm: fx.GraphModule | torch.export.ExportedProgram,
    *args: Any,
    executor: Executors = "aten",
    executor_parameters: Mapping[str, object] | None = None,
) -> Any:
    """Run an FX graph on an executor; its targets may be ATen operators, prims, or any torch function.

    The graph is prepared once for each kind of inputs; editing it and calling `recompile()` prepares it anew.
    An exported program runs on its own state: buffers that it changes are changed in its `state_dict`.

    Raises:
        TypeError: where gm is neither a `torch.fx.GraphModule` nor a `torch.export.ExportedProgram`.
        ValueError: for an unknown executor or executor parameter.

    >>> import torch, primexec
    >>> gm = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    >>> primexec.execute(gm, torch.tensor([-1.0, 1.0]))
    tensor([1., 2.])
    """
    if not isinstance(gm, (fx.GraphModule, torch.export.ExportedProgram)):
        raise TypeError(
            f"execute takes a torch.fx.GraphModule or a torch.export.ExportedProgram, got {type(gm).__qualname__}"
        )
    options = Options.of(executor, executor_parameters)
    # Kept on the graph's own module: nothing global owns it, and it goes when the module goes.
    prepared: dict[Any, Traced] = gm.__dict__.setdefault("_primexec_prepared", _NotCopied())
    # Its code is asked for, because the modules of programs write it only then.
    code = gm.code and type(gm).forward if isinstance(gm, fx.GraphModule) else None
    key = options, code
    if key not in prepared:
        for stale in [k for k in prepared if k[1] is not code]:
            del prepared[stale]
        prepared[key] = Traced(gm if isinstance(gm, fx.GraphModule) else gm.module(), options, 64)
    return prepared[key](*args)


class _NotCopied(dict[Any, Traced]):
    """What is kept on a user's object; deep copies and pickles of the object do without it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NotCopied:
        return _NotCopied()

    def __reduce__(self) -> tuple[Any, ...]:
        return _NotCopied, ()


def _parameter_names(fn: Any) -> set[str]:
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        return set()
