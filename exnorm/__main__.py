"""`python -m exnorm` is the command `exnorm`."""

from exnorm.cli import main

main()
