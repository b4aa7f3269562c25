"""Flashes a Debian whose first process is systemd: what starts, restarts and goes back there is no script of ours."""
