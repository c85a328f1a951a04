//! `cargo xtask build`.

use crate::build::{self, Form, Rom, Tools};
use crate::examples;
use crate::link;
use crate::table::{Align, Cell, DIM, Table};
use crate::toolchain::Need;
use anyhow::{Result, anyhow, bail};
use sha2::{Digest, Sha256};
use std::process::ExitCode;
use vmi_abi::{CALLS_3_0, REVISION_3_0, REVISION_13_0, REVISION_13_3, RelocationType, Revision};
use vmi_native_backend::binding::{Bind, answer};

/// Builds the ROM images and the test guest, or what a kernel links.
///
/// Compiles for the bare machine, links each image at two addresses, compares the bytes, and
/// refuses what could not run from read-only storage at any address. Leaves target/rom/*.rom with
/// the linked file beside each, and target/guest/vmi-guest.elf.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which revision of the interface the image serves. [default: all; with --link: 3.0]
    #[arg(long, value_enum, hide_default_value = true)]
    api: Option<Api>,

    /// Instead of images, build what a kernel links: in target/link/ an object and a library with
    /// the native calls and nothing else, and vmi.h, the interface for C.
    #[arg(long, conflicts_with_all = ["bind", "card"])]
    link: bool,

    /// Instead of images, build the example kernels: target/examples/*.elf.
    #[arg(long, conflicts_with_all = ["bind", "card", "api", "link"])]
    examples: bool,

    /// Of revision 3.0: what the image answers, and whether short calls become native code where
    /// they are called. A ROM of 13.x has no answers to choose from. [default: all]
    #[arg(long, value_enum, hide_default_value = true)]
    bind: Option<Binding>,

    /// Which backends an image of revision 3.0 has, that rewrites sites. [default: all]
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "BACKEND,...",
        hide_default_value = true
    )]
    #[arg(conflicts_with_all = ["bind", "link", "examples"])]
    backends: Vec<BackendName>,

    /// Also write a copy of each image for the expansion ROM of a PCI card, here the card's vendor
    /// and device in hexadecimal: 8086:100e is QEMU's e1000. SeaBIOS starts no other ROM from a
    /// card than one with the card's own numbers.
    #[arg(long, value_name = "VENDOR:DEVICE", value_parser = card)]
    card: Option<(u16, u16)>,
}

/// A backend of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum BackendName {
    /// The bare machine. Every image has it.
    Native,
    /// The reference hypervisor: target/rom/vmi-reference.rom, native on everything else.
    Reference,
    /// Xen and the reference hypervisor: target/rom/vmi.rom, native on everything else.
    Xen,
}

/// Reads `VENDOR:DEVICE`.
fn card(text: &str) -> Result<(u16, u16), String> {
    let number = |digits: &str| u16::from_str_radix(digits, 16).ok();
    text.split_once(':')
        .and_then(|(vendor, device)| Some((number(vendor)?, number(device)?)))
        .ok_or_else(|| "not two hexadecimal numbers like 8086:100e".into())
}

/// Which revisions to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Api {
    /// Linux 2.6.21 to 2.6.36: calls are looked up.
    #[value(name = "3.0")]
    Lookup,
    /// target/rom/vmi-13.0-native.rom, for the Linux patches of March 2006: calls lie in slots.
    #[value(name = "13.0")]
    Slots13_0,
    /// target/rom/vmi-13.3-native.rom, for Sanos: slots as well.
    #[value(name = "13.3")]
    Slots13_3,
    /// All of them.
    All,
}

impl Api {
    const fn revisions(self) -> &'static [Revision] {
        match self {
            Self::Lookup => &[REVISION_3_0],
            Self::Slots13_0 => &[REVISION_13_0],
            Self::Slots13_3 => &[REVISION_13_3],
            Self::All => &[REVISION_3_0, REVISION_13_0, REVISION_13_3],
        }
    }
}

/// Which images of revision 3.0 to build.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Binding {
    /// target/rom/vmi-native.rom: as `fastest`, and short calls become native code at their sites.
    Rewrite,
    /// target/rom/vmi-native-fastest.rom: the guest is left with its own native code wherever that does the same.
    Fastest,
    /// target/rom/vmi-native-call.rom: CALL_REL wherever the interface lets it.
    Call,
    /// One of each.
    All,
}

impl Binding {
    const fn kinds(self) -> &'static [Bind] {
        match self {
            Self::Rewrite => &[Bind::Rewrite],
            Self::Fastest => &[Bind::Fastest],
            Self::Call => &[Bind::Call],
            Self::All => &Bind::ALL,
        }
    }
}

/// The images that were asked for.
///
/// # Errors
///
/// Answers were chosen for a revision that has none.
fn forms(args: &Args) -> Result<Vec<Form>> {
    if !args.backends.is_empty() {
        if !matches!(args.api, None | Some(Api::Lookup)) {
            bail!(
                "--backends is for revision 3.0: the images of 13.x have the native backend only"
            );
        }
        let form = if args.backends.contains(&BackendName::Xen) {
            Form::Hypervisors
        } else if args.backends.contains(&BackendName::Reference) {
            Form::Reference
        } else {
            Form::Lookup(Bind::Rewrite)
        };
        return Ok(vec![form]);
    }
    let kinds = args.bind.unwrap_or(Binding::All).kinds();
    let lookup = || kinds.iter().copied().map(Form::Lookup);
    Ok(match (args.api.unwrap_or(Api::All), args.bind) {
        (Api::Lookup, None) => lookup().chain([Form::Reference, Form::Hypervisors]).collect(),
        (Api::Lookup, Some(_)) => lookup().collect(),
        (Api::Slots13_0, None) => vec![Form::Slots13_0],
        (Api::Slots13_3, None) => vec![Form::Slots13_3],
        (Api::All, None) => {
            let others = [Form::Reference, Form::Hypervisors, Form::Slots13_0, Form::Slots13_3];
            lookup().chain(others).collect()
        }
        // Whoever chooses answers means the revision that has them.
        (Api::All, Some(_)) => lookup().collect(),
        (Api::Slots13_0 | Api::Slots13_3, Some(_)) => {
            bail!("--bind is for revision 3.0: in 13.x a guest enters the slots without asking")
        }
    })
}

/// Builds.
///
/// # Errors
///
/// Something that the build needs is missing, or the build fails.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.examples {
        return examples();
    }
    let forms = forms(args)?;
    let findings = super::setup::provide(Need::BUILD)?;
    let tools = Tools::from_findings(&findings)?;
    if args.link {
        return link(&tools, args.api.unwrap_or(Api::Lookup));
    }
    let roms =
        forms.into_iter().map(|form| build::rom(&tools, form)).collect::<Result<Vec<Rom>>>()?;

    let mut table = Table::new(&[
        Align::Left,
        Align::Right,
        Align::Right,
        Align::Right,
        Align::Left,
        Align::Left,
    ]);
    table.heading(&["image", "used", "free", "size", "sha-256", "answers"]);
    for rom in &roms {
        let size = rom.image.bytes.len();
        table.row([
            build::shown(&rom.path).into(),
            rom.image.used.to_string().into(),
            rom.image.free().to_string().into(),
            size.to_string().into(),
            sum(&rom.image.bytes),
            answers(rom.form).into(),
        ]);
    }
    anstream::print!("{}", table.render());
    if let Some((vendor, device)) = args.card {
        for rom in &roms {
            let path = build::write_for_card(rom, vendor, device)?;
            anstream::println!("{}", build::shown(&path));
        }
    }
    let by = format!("by {} and {}", tools.compiler, tools.linker);
    anstream::println!("{}{by}{}", DIM.render(), DIM.render_reset());

    let guest = build::guest(&tools, &link::all(&tools, &roms)?)?;
    anstream::println!("{}", build::shown(&guest));
    Ok(ExitCode::SUCCESS)
}

/// Builds what kernels link.
fn link(tools: &Tools, api: Api) -> Result<ExitCode> {
    let mut table = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Left]);
    table.heading(&["linked into a kernel", "image", "symbols", "sha-256"]);
    for revision in api.revisions() {
        let link = link::build(tools, *revision)?;
        for path in [&link.object, &link.archive] {
            table.row([
                build::shown(path).into(),
                link.rom.image.bytes.len().to_string().into(),
                link.symbols.to_string().into(),
                sum(&build::read(path)?),
            ]);
        }
    }
    anstream::print!("{}", table.render());
    anstream::println!("{}", build::shown(&link::header_path()));
    Ok(ExitCode::SUCCESS)
}

/// Builds the example kernels.
fn examples() -> Result<ExitCode> {
    let findings = super::setup::provide(Need::EXAMPLES)?;
    let tools = Tools::from_findings(&findings)?;
    let gcc = findings.gcc.as_ref().map_err(|reason| anyhow!("{reason}"))?;
    let link = link::build(&tools, REVISION_3_0)?;
    for path in [examples::c_kernel(&tools, gcc, &link)?, examples::rust_kernel(&tools, &link)?] {
        anstream::println!("{}", build::shown(&path));
    }
    Ok(ExitCode::SUCCESS)
}

/// As many digits of the sum as tell two images apart.
fn sum(bytes: &[u8]) -> Cell {
    Cell::new(build::hex(&Sha256::digest(bytes)[..8]), DIM)
}

/// How many calls the image answers in which way, or has slots for.
fn answers(form: Form) -> String {
    let bind = match form {
        Form::Lookup(bind) => bind,
        Form::Reference | Form::Hypervisors => Bind::Rewrite,
        _ => return format!("{} slots", form.revision().calls().count()),
    };
    let kinds = [
        RelocationType::NONE,
        RelocationType::CALL_REL,
        RelocationType::JUMP_REL,
        RelocationType::NOP,
    ];
    kinds
        .into_iter()
        .filter_map(|kind| {
            let count = CALLS_3_0.iter().filter(|call| answer(call, bind).0 == kind).count();
            (count != 0).then(|| format!("{count} {}", kind.name().unwrap_or("?")))
        })
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_chosen_for_revision_3_0_only() {
        let asked = |api, bind| {
            let backends = Vec::new();
            forms(&Args {
                api: Some(api),
                link: false,
                examples: false,
                bind,
                backends,
                card: None,
            })
        };
        let names = |api, bind| -> Vec<&str> {
            asked(api, bind).expect("sensible").into_iter().map(Form::name).collect()
        };
        assert_eq!(names(Api::All, None).len(), 7);
        assert_eq!(names(Api::All, Some(Binding::Call)), ["vmi-native-call"]);
        assert_eq!(names(Api::Lookup, Some(Binding::Rewrite)), ["vmi-native"]);
        assert_eq!(names(Api::Lookup, None).len(), 5);
        assert_eq!(names(Api::Slots13_0, None), ["vmi-13.0-native"]);
        assert_eq!(names(Api::Slots13_3, None), ["vmi-13.3-native"]);
        let with = |api, backends: &[BackendName]| {
            let (backends, bind) = (backends.to_vec(), None);
            forms(&Args { api, link: false, examples: false, bind, backends, card: None })
        };
        let both = [BackendName::Native, BackendName::Reference];
        assert_eq!(with(None, &both).expect("sensible"), [Form::Reference]);
        assert_eq!(with(Some(Api::Lookup), &both).expect("sensible"), [Form::Reference]);
        let all = [BackendName::Native, BackendName::Reference, BackendName::Xen];
        assert_eq!(with(None, &all).expect("sensible"), [Form::Hypervisors]);
        assert_eq!(with(None, &both[..1]).expect("sensible"), [Form::Lookup(Bind::Rewrite)]);
        for api in [Api::Slots13_0, Api::Slots13_3] {
            assert!(asked(api, Some(Binding::All)).is_err());
            assert!(with(Some(api), &both).is_err());
        }
    }
}
