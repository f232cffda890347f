"""Models of rows and of graphs: one architecture a file. Images have timm."""

from edgekd.models.architectures._architecture import LayersConfig

__all__ = ["LayersConfig"]
