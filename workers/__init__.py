"""The engine: cuts a timm vision transformer into heads and runs step programs over Ray Train workers."""
