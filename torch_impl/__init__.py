"""OverLoCK in PyTorch (jittor_impl: in Jittor). models.py is the network, train.py the program."""
