"""Tables that are written as one JSON object. Called by files.py."""


def rows_of(content: dict):
    """The rows of an object that holds a table: `{"data": [...]}`, or as pandas writes one (orient columns, index, split)."""
    values = list(content.values())
    for name in ("data", "rows", "examples", "records"):
        rest = [value for key, value in content.items() if key != name]
        rows = content.get(name)
        if (
            isinstance(rows, list)
            and rows
            and isinstance(rows[0], dict)
            and not any(isinstance(v, list | dict) for v in rest)
        ):
            return rows
    tables = [value for value in values if isinstance(value, list)]
    if len(tables) == 1 and len(tables[0]) > 1 and all(isinstance(row, dict) for row in tables[0]):
        return tables[0]  # under a name of its own
    if set(content) == {"columns", "index", "data"}:
        return [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        if len(values) == 1 and all(isinstance(row, dict) for row in values[0]):
            return values[0]
        if not any(isinstance(cell, dict) for cell in values[0]):
            return [dict(zip(content, cells, strict=True)) for cells in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) and value for value in values):
        if all(key.isdecimal() for key in content):
            return values
        numbers = values[0].keys()
        if all(key.isdecimal() for key in numbers) and all(value.keys() == numbers for value in values):
            return [{name: content[name][number] for name in content} for number in numbers]
    return content
