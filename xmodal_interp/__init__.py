"""xmodal_interp: record and analyse the attention of vision-language models.

The public names are in ``__init__.pyi``. Each is imported when it is first used, so that
``import xmodal_interp`` loads neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
