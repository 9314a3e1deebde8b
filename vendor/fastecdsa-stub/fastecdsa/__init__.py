"""Stand-in for fastecdsa, which libp2p pins for P-256 and secio; p2pflop refuses both.

The real package has no wheel and needs a C compiler and GMP's headers. Names exist, so that libp2p
can be imported; any use of them raises.
"""


class _Refused(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(
            "this is p2pflop's stand-in for fastecdsa: P-256 keys and secio are not supported; "
            "install fastecdsa itself if another program of this environment needs them"
        )


class Refused(metaclass=_Refused):
    """What every name of this package stands for."""
