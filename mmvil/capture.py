"""Inference as one CUDA graph: a small model then takes the time of its kernels, not that of launching them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ['CapturedModel', 'capture_inference', 'capturing']

WARMUP_RUNS = 3


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: object) -> Iterator[None]:
    """`torch.cuda.graph`, after whose failure random numbers can still be drawn.

    Args:
        graph: Takes what the body launches.
        **options: Further arguments of `torch.cuda.graph`.
    """
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except BaseException:
        # A capture that fails leaves the generator's state as in a capture; one that does not, ends that.
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device='cuda')
        raise


class CapturedModel:
    """A model's forward pass for one shape of input, replayed as a CUDA graph; see `capture_inference`.

    Attributes:
        shape: Shape of the input.
        dtype: Its dtype.
        device: Its device.
    """

    def __init__(self, model: nn.Module, example: Tensor, arguments: Mapping[str, object], copy: bool) -> None:
        self.shape, self.dtype, self.device, self._copy = example.shape, example.dtype, example.device, copy
        # The graph reads the memory that the weights have now. Holding it keeps that safe if they are moved later.
        self._model, self._memory = model, [x.detach() for x in (*model.parameters(), *model.buffers())]
        self._graph = torch.cuda.CUDAGraph()
        autocast = torch.is_autocast_enabled('cuda')
        # With its cache autocast would hand the graph casts made outside of it, blind to later changes of the weights.
        with (
            torch.cuda.device(self.device),
            torch.inference_mode(False),  # its tensors could not be written to outside of it
            torch.no_grad(),
            torch.autocast('cuda', torch.get_autocast_dtype('cuda'), enabled=autocast, cache_enabled=False),
        ):
            self._input = example.detach().clone()
            self._output = self._record(lambda: model(self._input, **arguments))
        _copied(self._output)  # refuses what cannot be handed out

    def _record(self, work: Callable[[], object]) -> object:
        """Run the model until nothing is compiled or allocated any more, then capture it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        with capturing(self._graph):
            return work()

    def __call__(self, x: Tensor) -> object:
        """Run the model.

        Args:
            x: Input of the captured shape, dtype and device.

        Returns:
            What the model returns for it.

        Raises:
            TypeError: The input is no tensor.
            ValueError: The input differs from what was captured.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f'the input must be a torch.Tensor, got {type(x).__name__}')
        if x.shape != self.shape or x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f'captured for {_described(self.shape, self.dtype, self.device)}, got '
                f'{_described(x.shape, x.dtype, x.device)}; capture_inference once for each shape'
            )
        with torch.no_grad(), torch.cuda.device(self.device):
            self._input.copy_(x)
            self._graph.replay()
            return _copied(self._output) if self._copy else self._output


def capture_inference(model: nn.Module, example: Tensor, *, copy: bool = True, **arguments: object) -> CapturedModel:
    """Record a model's forward pass as a CUDA graph for one shape of input.

    The graph does what the model did at the capture, also under the autocast that was on then. Weights that change in
    place (`load_state_dict`, averaging) are seen; after `model.to(...)` or a new parameter, capture again. One captured
    model must not run on two streams at once. Each shape takes its own memory for intermediate results.

    Args:
        model: Module in evaluation mode, with all weights on one CUDA device: a backbone or a whole classifier.
        example: Input with the shape, dtype and device to capture for, such as (B, 3, H, W).
        copy: Hand out copies. False hands out the graph's own memory, which the next call overwrites.
        **arguments: Further arguments of the forward pass, such as mode='tensor'.

    Returns:
        A function of one input of that shape that returns what the model returns: a tensor, or tuples, lists and dicts
        of tensors.

    Raises:
        TypeError: The example is no tensor, or the model returns something else than tensors.
        ValueError: The example or the weights are not on one CUDA device, or the model is in training mode.

    Example:
        >>> import torch
        >>> from mmvil.models import VisionLSTM
        >>> model = VisionLSTM(arch=dict(embed_dims=32, num_layers=2)).eval()
        >>> if torch.cuda.is_available():
        ...     image = torch.randn(1, 3, 224, 224, device='cuda')
        ...     run = capture_inference(model.cuda(), image)
        ...     assert torch.equal(run(image)[0], model(image)[0])
    """
    if not isinstance(example, Tensor):
        raise TypeError(f'the example must be a torch.Tensor, got {type(example).__name__}')
    if not example.is_cuda:
        missing = '' if torch.cuda.is_available() else ', and there is none here'
        raise ValueError(f'a CUDA graph needs an example on a CUDA device, got one on {example.device}{missing}')
    elsewhere = {str(x.device) for x in (*model.parameters(), *model.buffers()) if x.device != example.device}
    if elsewhere:
        raise ValueError(f'all weights must be on the device of the example, {example.device}, got {sorted(elsewhere)}')
    if model.training:
        raise ValueError('the model must be in evaluation mode (model.eval()), got one in training mode')
    return CapturedModel(model, example, arguments, copy)


def _described(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f'{tuple(shape)} {dtype} on {device}'


def _copied(output: object) -> object:
    """The same structure with copies of its tensors."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {key: _copied(value) for key, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(_copied(value) for value in output)
    raise TypeError(f'only tensors, and tuples, lists and dicts of them, can be captured, got {type(output).__name__}')
