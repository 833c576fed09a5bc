"""OverLoCK where other libraries look for models: timm.py, openmmlab.py. Nothing else needs it."""
