"""mLSTM operators. They need torch alone."""

from .mlstm import available_backends, mlstm

__all__ = ['available_backends', 'mlstm']
