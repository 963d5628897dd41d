

def test_the_page_on_configuration_names_every_argument_and_its_values(capsys, get_config):
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    for file in ("llava.py", "tiny.py"):
        with pytest.raises(SystemExit):
            get_config(file, "help")
        usage = capsys.readouterr().out.partition("\nFields, set by")[0]
        for key, values in re.findall(r"^(\w+): .*\n((?:  .*\n?)+)", usage, re.MULTILINE):
            (row,) = re.findall(rf"^\| `{key}` \| (.*)$", page, re.MULTILINE)
            missing = [value for value in re.findall(r"^  (\S+)", values, re.MULTILINE) if f"`{value}`" not in row]
            assert missing == [], (file, key)
