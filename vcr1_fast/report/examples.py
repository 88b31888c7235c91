def write_examples_html(rows, records, path, max_examples=40):
    return path
