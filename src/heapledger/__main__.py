"""`python -m heapledger`."""

from heapledger.cli import main

main()
