from .rows import shown_values
from .server import ViewServer, serve
from .views import View, view

__all__ = ["View", "ViewServer", "serve", "shown_values", "view"]
