"""The extension's threads."""

import ctypes
import weakref


class ThreadPool:
    """Threads of the extension; they end with the last object that uses them.

    Attributes:
        handle: of the pool in the extension.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        """Start the threads.

        Args:
            library: of the extension.
            num_threads: the caller's among them.
        """
        self.handle: int = library.proa_pool_create(num_threads)
        weakref.finalize(self, library.proa_pool_destroy, self.handle)
