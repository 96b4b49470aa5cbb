"""The plug-in: SSync in the training of any host, as a callback, a mixin or a context manager."""
