//! The two ways into a running QEMU, against others that speak as QEMU does, or nearly.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;
use xtask::inspect::source::{Found, MACHINE_AREA, SourceArgs, SourceError};

/// Where the image lies in the area that is read.
const PLACE: usize = 0x8000;

/// The option-ROM area with an image in it.
fn area() -> Vec<u8> {
    let mut bytes = vec![0; (MACHINE_AREA.end - MACHINE_AREA.start) as usize];
    let image = image();
    bytes[PLACE..PLACE + image.len()].copy_from_slice(&image);
    bytes
}

fn image() -> Vec<u8> {
    let file = xtask::workspace().join("fuzz/corpus/rom/good-native.rom");
    std::fs::read(file).expect("a file of the corpus")
}

#[track_caller]
fn is_image(found: Result<Found, SourceError>) {
    let found = found.expect("the image");
    let [rom] = found.roms.as_slice() else { panic!("{found:?}") };
    assert_eq!(rom.rom.file(), image());
    assert_eq!(rom.origin.physical, Some(MACHINE_AREA.start + PLACE as u64));
    assert_eq!(rom.origin.file_offset, None);
}

/// Answers the machine protocol: greeting, then each command as `answer` has it.
fn serve_qmp<S: Read + Write>(stream: S, answer: impl Fn(&serde_json::Value) -> String) {
    let mut stream = BufReader::new(stream);
    let _ = stream.get_mut().write_all(b"{\"QMP\": {\"version\": {}}}\r\n");
    let mut line = String::new();
    while stream.read_line(&mut line).is_ok_and(|length| length != 0) {
        let command = serde_json::from_str(&line).expect("a line of JSON");
        if stream.get_mut().write_all(answer(&command).as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

/// QEMU's own answers; `written` goes to the file that `pmemsave` names.
fn qemu(command: &serde_json::Value, written: &[u8]) -> String {
    if command["execute"] == "pmemsave" {
        assert_eq!(command["arguments"]["val"], MACHINE_AREA.start);
        assert_eq!(command["arguments"]["size"], MACHINE_AREA.end - MACHINE_AREA.start);
        let name = command["arguments"]["filename"].as_str().expect("a name");
        std::fs::write(name, written).expect("the folder is there");
    }
    "{\"event\": \"RTC_CHANGE\"}\r\n{\"return\": {}}\r\n".to_owned()
}

fn over_tcp(answer: impl Fn(&serde_json::Value) -> String + Send + 'static) -> SourceArgs {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("tcp:{}", listener.local_addr().expect("its number"));
    thread::spawn(move || serve_qmp(listener.accept().expect("a guest").0, answer));
    SourceArgs { qmp: Some(endpoint.parse().expect("right")), wait: 10, ..SourceArgs::default() }
}

#[test]
fn the_machine_protocol_gives_the_image() {
    is_image(over_tcp(|command| qemu(command, &area())).find());
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("qmp");
    let listener = UnixListener::bind(&socket).expect("a socket");
    thread::spawn(move || {
        serve_qmp(listener.accept().expect("a guest").0, |command| qemu(command, &area()));
    });
    let endpoint = format!("unix:{}", socket.display());
    let qmp = Some(endpoint.parse().expect("right"));
    is_image(SourceArgs { qmp, wait: 10, ..SourceArgs::default() }.find());
}

#[test]
fn what_goes_wrong_over_the_machine_protocol_is_said() {
    let said = |args: SourceArgs| args.find().expect_err("no image").to_string();
    let text = said(over_tcp(|command| qemu(command, b"too little")));
    assert!(text.contains("10 bytes instead of 196608"), "{text}");
    let text = said(over_tcp(|_| "{\"return\": {}}\n".to_owned()));
    assert!(
        text.contains("reading the file that QEMU wrote") && text.contains("gdb stub"),
        "{text}"
    );
    let text = said(over_tcp(|_| "{\"error\": {\"desc\": \"not today\"}}\n".to_owned()));
    assert!(text.contains("refused while agreeing on capabilities: not today"), "{text}");
    let text = said(over_tcp(|_| "{\"error\": {}}\n".to_owned()));
    assert!(text.contains("refused while agreeing"), "{text}");
    let text = said(over_tcp(|command| qemu(command, &vec![0; 0x3_0000])));
    assert!(text.contains("no VMI ROM found"), "{text}");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("tcp:{}", listener.local_addr().expect("its number"));
    thread::spawn(move || drop(listener.accept()));
    let qmp = Some(endpoint.parse().expect("right"));
    let text = said(SourceArgs { qmp, wait: 10, ..SourceArgs::default() });
    assert!(text.contains("the connection broke while waiting for the greeting"), "{text}");
}

/// Answers as QEMU's gdb stub does, with this status of the machine, and passes on every question.
fn stub(status: &'static str, memory: Option<Vec<u8>>) -> (SourceArgs, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = listener.local_addr().expect("its number").to_string();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a guest");
        let mut bytes = BufReader::new(stream.try_clone().expect("a second end"));
        let mut say = move |text: &str| {
            let sum = text.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
            // In one piece, so that none of it waits for company.
            let _ = stream.write_all(format!("+${text}#{sum:02x}").as_bytes());
        };
        let hexadecimal =
            |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
        let mut before = Vec::new();
        while bytes.read_until(b'$', &mut before).is_ok_and(|length| length != 0) {
            let mut question = Vec::new();
            let mut sum = [0; 2];
            if bytes.read_until(b'#', &mut question).is_err() || bytes.read_exact(&mut sum).is_err()
            {
                return;
            }
            question.pop();
            let question = String::from_utf8(question).expect("text");
            match question.strip_prefix('m').and_then(|range| range.split_once(',')) {
                Some((address, length)) => {
                    let number = |text| u64::from_str_radix(text, 16).expect("a number");
                    let start = (number(address) - MACHINE_AREA.start) as usize;
                    match &memory {
                        Some(memory) => {
                            say(&hexadecimal(&memory[start..][..number(length) as usize]))
                        }
                        None => say("E14"),
                    }
                }
                None if question.starts_with("qRcmd,") => {
                    say("T02thread:01;");
                    say(&format!("O{}", hexadecimal(status.as_bytes())));
                    say("OK");
                }
                None => say("OK"),
            }
            // Nobody may listen any more.
            let _ = tell.send(question);
            before.clear();
        }
    });
    (SourceArgs { gdb: Some(endpoint), wait: 10, ..SourceArgs::default() }, told)
}

#[test]
fn the_gdb_stub_gives_the_image_and_a_running_machine_goes_on() {
    for (status, keep_stopped, goes_on) in [
        ("VM status: running\r\n", false, true),
        ("VM status: paused\r\n", false, true),
        ("VM status: paused (prelaunch)\r\n", false, false),
        ("VM status: running\r\n", true, false),
    ] {
        let (args, told) = stub(status, Some(area()));
        is_image(SourceArgs { keep_stopped, ..args }.find());
        let questions: Vec<String> = told.iter().collect();
        assert_eq!(questions.last().is_some_and(|last| last == "D"), goes_on, "{status}");
        // Whoever comes next wants linear addresses.
        let mode = questions.iter().rfind(|question| question.starts_with("Qqemu"));
        assert_eq!(mode.map(String::as_str), Some("Qqemu.PhyMemMode:0"));
    }
}

#[test]
fn a_machine_goes_on_when_its_memory_cannot_be_read() {
    let (args, told) = stub("VM status: running\r\n", None);
    let text = args.find().expect_err("no memory").to_string();
    assert!(text.contains("refused while reading memory: E14 for 1024 bytes at C0000h"), "{text}");
    assert_eq!(told.iter().last().as_deref(), Some("D"));
}
