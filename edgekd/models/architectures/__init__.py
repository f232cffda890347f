"""Models of rows and of graphs: one architecture a file. Images have timm."""
