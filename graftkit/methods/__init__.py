"""Methods: how parameters are added, frozen and grouped. One file each; see `docs/new-method.md`."""
