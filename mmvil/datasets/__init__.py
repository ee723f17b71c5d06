"""Data sets and transforms, registered under the scope `mmvil`."""

from .digits import Digits

__all__ = ['Digits']
