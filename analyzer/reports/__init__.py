"""The reports: one file each. `build` makes the JSON of docs/json.md, `render` prints the same object as text."""
