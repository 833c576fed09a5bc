"""OverLoCK in Jittor: models.py is the network, train.py the
program. torch_impl is the same in PyTorch.
"""
