__version__ = "0.2.0"


def __getattr__(name: str):
    "`from vitomr import Transcriber`, without torch for those who do not ask for it."
    if name == "Transcriber":
        from .transcribe import Transcriber

        return Transcriber
    raise AttributeError(f"module 'vitomr' has no attribute {name!r}")
