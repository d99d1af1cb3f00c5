"""`python -m tvm_vitq` is `vitq`."""

from tvm_vitq.cli import main

raise SystemExit(main())
