"""``python -m capibara_flow`` is ``capibara``."""

from capibara_flow.cli import main

if __name__ == "__main__":
    main()
