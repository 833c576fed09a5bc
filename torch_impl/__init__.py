"""OverLoCK in PyTorch: models.py is the network, train.py the
program. jittor_impl is the same in Jittor.
"""
