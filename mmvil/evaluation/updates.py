"""Updates on batches of one size; on a GPU as a CUDA graph, so that the host is not the limit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..capture import capturing

__all__ = ['Updater', 'why_not_graphed']


def why_not_graphed(optim_wrapper: OptimWrapper, device: torch.device) -> str | None:
    """Tell why updates cannot be a CUDA graph.

    Args:
        optim_wrapper: Holds the optimizer.
        device: Where the model lives.

    Returns:
        The reason, or None if they can.
    """
    if device.type != 'cuda':
        return 'the model is not on a GPU'
    if any('capturable' not in group for group in optim_wrapper.optimizer.param_groups):
        return f'{type(optim_wrapper.optimizer).__name__} has no option `capturable`'
    scaler = getattr(optim_wrapper, 'loss_scaler', None)
    if scaler is not None and scaler.is_enabled():
        return 'loss scaling asks for the gradients at every step'
    if optim_wrapper.clip_grad_kwargs or optim_wrapper._accumulative_counts != 1:
        return 'clipping and accumulation of gradients decide on the host'
    return None


class Updater:
    """Does one update after another.

    A ViL forward and backward pass is thousands of short kernels, which a host launches more slowly than a GPU runs
    them. After `EAGER_STEPS` updates the work of one is captured as a CUDA graph and replayed from then on, with the
    same kernels on the same parameters. What cannot be captured goes on as before, with one log line.

    Args:
        model: The classifier, in training mode.
        optim_wrapper: Its optimizer; learning rates may change between updates.
        batch_size: Images of every batch.
        graph: Whether to capture where `why_not_graphed` has no objection.
    """

    EAGER_STEPS = 3  # PyTorch wants some before a capture: kernels get compiled, workspaces allocated

    def __init__(self, model: nn.Module, optim_wrapper: OptimWrapper, batch_size: int, graph: bool = True) -> None:
        device = next(model.parameters()).device
        self.model, self.optim_wrapper, self.done = model, optim_wrapper, 0
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.samples = [DataSample().set_gt_label(label) for label in self.labels.split(1)]  # views
        self.wants_graph = graph and why_not_graphed(optim_wrapper, device) is None
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.wants_graph:
            self.groups = optim_wrapper.optimizer.param_groups
            for group in self.groups:
                group['capturable'] = True
            self.rates = torch.zeros(len(self.groups), device=device)
            self.stream = torch.cuda.Stream(device)

    @property
    def warmup_steps(self) -> int:
        """Updates until the speed is that of the following ones."""
        return self.EAGER_STEPS + 1 if self.wants_graph else 1

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do one update.

        Args:
            images: uint8, (B, 3, H, W), BGR, on the model's device.
            labels: int64, (B,), likewise.

        Returns:
            The loss, without waiting for it; the next update may overwrite it.
        """
        self.labels.copy_(labels)
        if self.wants_graph and self.graph is None and self.done >= self.EAGER_STEPS:
            self._try_to_capture(images)
        self.done += 1
        if self.graph is not None:
            self.images.copy_(images)
            self._send_rates()
            self.graph.replay()
            return self.loss
        if not self.wants_graph:
            return self._update(images)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self._update(images)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _update(self, images: Tensor) -> Tensor:
        """Normalise, run forward and backward, step."""
        inputs = self.model.data_preprocessor({'inputs': images}, training=True)['inputs']
        with self.optim_wrapper.optim_context(self.model):
            losses = self.model(inputs, self.samples, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.optim_wrapper.update_params(loss)
        return loss.detach()

    def _try_to_capture(self, images: Tensor) -> None:
        """Capture one update, without doing it; give up on graphs if that fails."""
        self.images = images.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with self._rates_as_tensors(), capturing(graph):
                self.loss = self._update(self.images)
        except RuntimeError as error:
            self.wants_graph = False
            self.optim_wrapper.zero_grad(set_to_none=True)
            reason = str(error).strip().splitlines()
            print_log(f'updates run without a CUDA graph: {reason[0] if reason else error!r}', logger='current')
        else:
            self.graph = graph

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device; schedules go on with numbers."""
        numbers = [group['lr'] for group in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):
            group['lr'] = rate
        try:
            yield
        finally:
            for group, number in zip(self.groups, numbers, strict=True):
                group['lr'] = number

    def _send_rates(self) -> None:
        """Copy the present learning rates to where the graph reads them, without waiting."""
        rates = torch.tensor([group['lr'] for group in self.groups], pin_memory=True)
        self.rates.copy_(rates, non_blocking=True)
