"""Methods: how parameters are added, frozen and grouped. One file each; see CONTRIBUTING.md."""
