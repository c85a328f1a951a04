//! The pages about the inspector say what the inspector does.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use vmi_hv_backend::reference::record::Ending;
use xtask::hypervisor::End;
use xtask::inspect::{HIGH_BASE, Rom, Rule, report, survey, verify};

fn page(name: &str) -> Result<String> {
    let path = xtask::workspace().join("docs").join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// What a verb prints in a pipe; of the arguments only what the page uses.
fn printed(arguments: &str) -> Result<String> {
    let mut arguments = arguments.split(' ');
    let verb = arguments.next().context("a verb")?;
    let rest: Vec<&str> = arguments.collect();
    let file = rest.last().context("a file")?;
    let rom = Rom::parse(&std::fs::read(xtask::workspace().join(file))?)?;
    let text = match (verb, rest.as_slice()) {
        ("verify", [_]) => report::verdict(&verify(&rom)),
        ("inspect", [_]) => report::survey(&survey(&rom, HIGH_BASE)?),
        ("inspect", ["--call", name, _]) => {
            let facts = survey(&rom, HIGH_BASE)?;
            report::call(facts.calls.iter().find(|call| call.name == *name).context("a call")?)
        }
        _ => anyhow::bail!("this test does not know `{verb} {}`", rest.join(" ")),
    };
    Ok(anstream::adapter::strip_str(&text).to_string())
}

#[test]
fn the_session_is_as_it_really_is() -> Result<()> {
    let page = page("inspector.md")?;
    let mut shown = 0;
    for block in page.split("```console\n$ cargo xtask ").skip(1) {
        let (block, _) = block.split_once("\n```\n").context("an end of the block")?;
        let (arguments, output) = block.split_once('\n').context("output")?;
        assert_eq!(output.trim_end(), printed(arguments)?.trim_end(), "{arguments}");
        shown += 1;
    }
    assert_eq!(shown, 5);
    Ok(())
}

#[test]
fn every_rule_has_its_entry() -> Result<()> {
    let page = page("inspector.md")?;
    for rule in Rule::ALL {
        let entry = format!(
            "### `{rule}`\n\n{}\n\n- Why: {}\n- How to mend it: {}\n",
            rule.meaning(),
            rule.reason(),
            rule.remedy()
        );
        assert!(page.contains(&entry), "docs/inspector.md lacks this entry:\n\n{entry}");
    }
    assert_eq!(page.matches("\n### `").count(), Rule::ALL.len(), "an entry without a rule");
    Ok(())
}

#[test]
fn every_end_has_its_row() -> Result<()> {
    let page = page("on-the-reference-hypervisor.md")?;
    let others = [End::Guest, End::PowerOff, End::NoAnswer, End::Silent, End::Reset];
    let ends = Ending::ALL.iter().map(|ending| End::Hypervisor(*ending)).chain(others);
    for end in ends {
        let row = format!("| {} | `{}` | ", end.status(), end.name());
        assert!(page.contains(&row), "docs/on-the-reference-hypervisor.md lacks `{row}`");
    }
    Ok(())
}

/// Every field, with its path.
fn fields(value: &serde_json::Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (key, value) in object {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                fields(value, &path, found);
                found.insert(path);
            }
        }
        serde_json::Value::Array(elements) => {
            for element in elements {
                fields(element, &format!("{path}[]"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn the_fields_of_the_json_are_those_of_its_page() -> Result<()> {
    let mut emitted = BTreeSet::new();
    let mut version = 0;
    for name in ["good-native.rom", "good-13.3.rom", "good-rewriting.rom"] {
        let file = xtask::workspace().join("fuzz/corpus/rom").join(name);
        let facts = survey(&Rom::parse(&std::fs::read(file)?)?, HIGH_BASE)?;
        fields(&serde_json::to_value(&facts)?, "", &mut emitted);
        version = facts.version;
    }
    // What is like another object is not described again.
    emitted.retain(|field| !field.starts_with("calls[].keep_site."));
    let page = page("inspector-json.md")?;
    let documented: BTreeSet<String> = page
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split_once("` |")?.0.to_owned()))
        .collect();
    assert_eq!(documented, emitted);
    assert!(page.contains(&format!("`version` is {version};")));
    Ok(())
}
