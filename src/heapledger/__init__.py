"""heapledger: where does a Linux process's memory go?"""

__version__ = "0.1.0"
