"""Training passes as CUDA graphs: the host then launches two graphs a step instead of a thousand kernels."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ..capture import capturing

__all__ = ['TrainingGraphs']

EAGER_PASSES = 2
"""Passes of a kind of input that run as usual before it is captured: inputs seen once are not worth the memory."""
MAX_KINDS = 2
"""Kinds of inputs that are captured; each holds the activations of a whole pass for good."""


class TrainingGraphs:
    """Runs a module's forward function, in training as CUDA graphs where that is possible. One object for one module.

    A kind of input is its shape, dtype and device, the autocast and the parameters that need gradients. The third
    forward pass of a kind is captured with its backward pass and from then on replayed: the same kernels on the same
    parameters, with the same random numbers. Results are handed out as copies. Everything else runs as usual: other
    kinds, evaluation, a forward pass before the one before it has gone backward, and what cannot be captured (one log
    line says why). Hooks of the module's parts are not called in a replay.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple, int] = {}
        self._passes: dict[tuple, _Pass] = {}
        self._given_up = False

    def __reduce__(self) -> tuple:
        """Graphs belong to the parameters they were captured with: copies of a module begin anew."""
        return TrainingGraphs, ()

    def __call__(self, module: nn.Module, run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        """Run the forward function.

        Args:
            module: Whose parameters get gradients.
            run: The forward function: a tensor to a tuple of tensors.
            x: Its input.

        Returns:
            Its results.
        """
        if self._given_up or not _is_training_pass(module, x):
            return run(x)
        parameters = [p for p in module.parameters() if p.requires_grad]
        amp = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')
        kind = (x.shape, x.dtype, x.device, amp, tuple(p.data_ptr() for p in parameters))
        if kind not in self._passes:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= EAGER_PASSES or not self._capture(kind, module, run, parameters, x):
                return run(x)
        captured = self._passes[kind]
        return run(x) if captured.busy else _Replay.apply(captured, x, *parameters)

    def _capture(self, kind: tuple, module: nn.Module, run: Callable, parameters: Sequence[Tensor], x: Tensor) -> bool:
        """Capture a kind of input; whether it is there now."""
        # Weights that have moved will not come back; their graphs would only hold memory.
        self._passes = {other: held for other, held in self._passes.items() if other[-1] == kind[-1]}
        reason = _why_not(module, parameters)
        if reason is None and len(self._passes) == MAX_KINDS:
            reason = f'there are more than {MAX_KINDS} shapes of inputs'
            self._seen[kind] = -(1 << 60)  # the kinds that are there stay
        elif reason is None:
            try:
                with _fresh_leaves(module, parameters) as leaves:
                    self._passes[kind] = _Pass(run, leaves, x)
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                self._given_up = True
        else:
            self._given_up = True
        if reason is not None:
            print_log(f'training passes of {tuple(x.shape)} run without CUDA graphs: {reason}', logger='current')
        return reason is None


def _is_training_pass(module: nn.Module, x: object) -> bool:
    """Whether a pass is of the kind that is worth a graph."""
    return (
        isinstance(x, Tensor)
        and x.is_cuda
        and module.training
        and torch.is_grad_enabled()
        and not x.requires_grad
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _why_not(module: nn.Module, parameters: Sequence[Tensor]) -> str | None:
    """Why a module's passes cannot be captured."""
    if not parameters or len({(p.dtype, p.device) for p in parameters}) > 1:
        return 'the trainable parameters are not of one dtype on one device'
    if getattr(module, 'with_cp', False):
        return 'with_cp recomputes activations, which asks the host for random states'
    hooked = any(
        x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks
        for x in module.modules()
        if x is not module
    )
    return 'a submodule has hooks, which a graph would not call' if hooked else None


class _Turn:
    """One forward pass; alive until its results are forgotten or have gone backward."""

    def __init__(self) -> None:
        self.done = False


class _Pass:
    """Forward and backward pass of one kind of input, captured."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, ...]], parameters: Sequence[Tensor], x: Tensor) -> None:
        self._sizes = [p.numel() for p in parameters]
        self._shapes = [p.shape for p in parameters]
        self._input, self._turn = x.detach().clone(), lambda: None
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        amp = torch.is_autocast_enabled('cuda')
        # With its cache autocast would hand the graph casts made outside of it, blind to later updates of the weights.
        with (
            torch.cuda.device(x.device),
            _random_state_kept(x.device),
            torch.autocast('cuda', torch.get_autocast_dtype('cuda'), enabled=amp, cache_enabled=False),
        ):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # for the stream of a capture libraries allocate workspaces of their own
                outputs = run(self._input)
                self._upstream = [torch.zeros_like(out) for out in outputs]
                _flat_gradients(outputs, parameters, self._upstream)
            torch.cuda.current_stream().wait_stream(stream)
            pool = torch.cuda.graph_pool_handle()
            # Threads that load data may call CUDA meanwhile.
            options = {'pool': pool, 'stream': stream, 'capture_error_mode': 'thread_local'}
            with capturing(self._forward, **options):
                outputs = run(self._input)
            with capturing(self._backward, **options):
                self._gradients = _flat_gradients(outputs, parameters, self._upstream)
        self._outputs = [out.detach() for out in outputs]

    @property
    def busy(self) -> bool:
        """Whether a forward pass may still go backward, so that its activations must stay."""
        turn = self._turn()
        return turn is not None and not turn.done

    def forward(self, x: Tensor) -> tuple[_Turn, tuple[Tensor, ...]]:
        """Replay the forward pass."""
        self._input.copy_(x)
        self._forward.replay()
        turn = _Turn()
        self._turn = weakref.ref(turn)
        return turn, tuple(out.clone() for out in self._outputs)

    def backward(self, upstream: Sequence[Tensor]) -> list[Tensor]:
        """Replay the backward pass."""
        for own, given in zip(self._upstream, upstream, strict=True):
            own.copy_(given)
        self._backward.replay()
        # Copied: the engine may take what it gets for a parameter's .grad, to which later passes are added.
        parts = self._gradients.clone().split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Replay(torch.autograd.Function):
    """A captured pass in a graph of autograd."""

    @staticmethod
    def forward(ctx: FunctionCtx, captured: _Pass, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.captured = captured
        ctx.turn, outputs = captured.forward(x)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn.done:
            raise RuntimeError('the activations of this pass are gone; use cuda_graphs=False to go backward twice')
        ctx.turn.done = True
        return None, None, *ctx.captured.backward(upstream)


def _flat_gradients(outputs: Sequence[Tensor], parameters: Sequence[Tensor], upstream: Sequence[Tensor]) -> Tensor:
    """Gradients of the parameters behind each other."""
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(outputs, parameters, upstream)])


@contextmanager
def _fresh_leaves(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put leaves with the same memory in the places of a module's parameters, and give them in the same order.

    Autograd keeps the stream on which it first met a leaf for as long as a pass over it lives, such as that of a loss
    still held from the batch before. A backward pass waits for that stream; waiting for another breaks a capture.
    """
    leaves = {p: nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
    owners = [part._parameters for part in module.modules()]
    places = [(own, name, p) for own in owners for name, p in own.items() if p in leaves]
    try:
        for own, name, p in places:
            own[name] = leaves[p]
        yield list(leaves.values())
    finally:
        for own, name, p in places:
            own[name] = p


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Draw random numbers as if the body had drawn none."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)
