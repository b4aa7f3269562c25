"""`accelerate launch` that ends when the process that started it does, its workers with it."""

from __future__ import annotations

from accelerate.commands.launch import main

from edgepack.builders import child

if __name__ == "__main__":
    child.end_with_parent()
    main()
