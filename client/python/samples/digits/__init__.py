"""Train a network on handwritten digits with nine optimizers at once, without autograd.

The model's forward and backward pass are a few lines of NumPy. The loss, its gradient, the
optimizers, the schedules and the curves are the server's::

    cd client/python && python -m samples.digits --output ../../build/demo
"""
