//! Broken files: each is refused with the text its row says, quickly, and without taking memory
//! that the file does not justify; the good ones among them open.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use peak_alloc::PeakAlloc;
use serde::{Deserialize, Serialize};
use weightpack::io::index::resolve;
use weightpack::io::memory::MemorySource;
use weightpack::io::Container;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Most memory that opening one file may take.
const MOST_MEMORY: usize = 64 << 20;
/// Most time that opening one file may take; the build under test is not optimised.
const MOST_TIME: Duration = Duration::from_secs(20);

/// Tests that measure memory run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a row of `cases.json` says.
#[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct Row {
    /// Whole text of the error, paths counted from the corpus.
    error: Option<String>,
    /// Number of tensors, of a file that opens.
    tensors: Option<usize>,
    /// Warnings, of a file that opens.
    warnings: Vec<String>,
    /// Length of the file that the committed bytes are the beginning of.
    length: Option<u64>,
    /// Memory in MiB that this one may take.
    memory: Option<usize>,
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

fn rows() -> BTreeMap<String, Row> {
    serde_json::from_str(&fs::read_to_string(corpus().join("cases.json")).unwrap()).unwrap()
}

/// Committed files, as paths below the corpus.
fn files() -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            match path.is_dir() {
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    for kind in ["safetensors", "gguf", "split", "index"] {
        walk(&corpus().join(kind), &mut found);
    }
    let name = |path: &PathBuf| {
        path.strip_prefix(corpus())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    let mut names: Vec<String> = found.iter().map(name).collect();
    names.sort();
    names
}

/// Rows stand for a file, or for a folder of files that belong together.
fn unit(path: &str) -> &str {
    match path.starts_with("split/") || path.starts_with("index/") {
        true => path.rsplit_once('/').unwrap().0,
        false => path,
    }
}

/// Runs `work` in a thread of its own; gives the result and the memory it took at its peak.
fn watched<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> (T, usize) {
    let (sender, receiver) = mpsc::channel();
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let thread = std::thread::spawn(move || sender.send(work()));
    let outcome = match receiver.recv_timeout(MOST_TIME) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: no answer after {MOST_TIME:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{what}: panicked"),
    };
    thread.join().unwrap().unwrap();
    (outcome, MEMORY.peak_usage().saturating_sub(before))
}

#[test]
fn every_row_has_a_file_and_every_file_has_a_row() {
    let _alone = alone();
    let rows = rows();
    let files = files();
    let files: BTreeSet<&str> = files.iter().map(|file| unit(file)).collect();
    let in_rows: BTreeSet<&str> = rows.keys().map(|row| unit(row)).collect();
    let without_row: Vec<_> = files.difference(&in_rows).collect();
    let without_file: Vec<_> = in_rows.difference(&files).collect();
    assert!(
        without_row.is_empty(),
        "files without a row: {without_row:?}"
    );
    assert!(
        without_file.is_empty(),
        "rows without a file: {without_file:?}"
    );
}

#[test]
fn each_file_leads_to_what_its_row_says() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let rows = rows();
    for file in files() {
        let path = folder.path().join(&file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(corpus().join(&file), &path).unwrap();
        if let Some(length) = rows.get(&file).and_then(|row| row.length) {
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(length)
                .unwrap();
        }
    }
    let prefix = format!("{}/", folder.path().display());
    let mut wrong = BTreeMap::new();
    for (file, row) in rows {
        let path = folder.path().join(&file);
        let (outcome, memory) = watched(&file, move || resolve(&path));
        let most = row.memory.map_or(MOST_MEMORY, |mib| mib << 20);
        assert!(memory <= most, "{file}: took {memory} bytes of memory");
        let mut found = match outcome {
            Err(error) => Row {
                error: Some(error.to_string().replace(&prefix, "")),
                ..Row::default()
            },
            Ok(opened) => {
                let headers = opened.files.iter().map(|(_, header)| header);
                let told = headers
                    .clone()
                    .flat_map(|header| header.warnings.iter().cloned());
                Row {
                    tensors: Some(headers.map(|header| header.entries.len()).sum()),
                    warnings: told.chain(opened.warnings.iter().cloned()).collect(),
                    ..Row::default()
                }
            }
        };
        (found.length, found.memory) = (row.length, row.memory);
        if found != row {
            wrong.insert(file, found);
        }
    }
    let found = serde_json::to_string_pretty(&wrong).unwrap();
    assert!(wrong.is_empty(), "other than their rows say: {found}");
}

/// Numbers that follow from a seed: SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit.max(1) as u64) as usize
    }
}

/// Changes, removes, doubles or adds some bytes.
fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    const EDGES: [u64; 8] = [0, 1, 7, 255, 1 << 31, 1 << 61, i64::MAX as u64, u64::MAX];
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len());
        let to = (at + 1 + dice.below(12)).min(bytes.len());
        match dice.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            1 if at < bytes.len() => bytes[at] = dice.roll() as u8,
            2 => drop(bytes.drain(at.min(to)..to)),
            3 => bytes.insert(at, dice.roll() as u8),
            4 => {
                let double = bytes[at.min(to)..to].to_vec();
                bytes.splice(to..to, double);
            }
            _ if at + 8 <= bytes.len() => {
                let edge = EDGES[dice.below(EDGES.len())];
                bytes[at..at + 8].copy_from_slice(&edge.to_le_bytes());
            }
            _ => bytes.truncate(at),
        }
    }
}

#[test]
fn thousands_of_damaged_files_never_panic_or_blow_up() {
    let _alone = alone();
    let seeds: Vec<(Container, Vec<u8>)> = files()
        .iter()
        .filter(|file| !file.starts_with("index/") || file.ends_with(".safetensors"))
        .map(|file| (fs::read(corpus().join(file)).unwrap(), file))
        .filter(|(bytes, _)| bytes.len() < 4096)
        .map(|(bytes, file)| (Container::from_path(Path::new(file)).unwrap(), bytes))
        .collect();
    assert!(seeds.len() > 150);
    let mut dice = Dice(2);
    let (mut opened, mut refused) = (0, 0);
    for round in 0..30_000 {
        let (container, seed) = &seeds[dice.below(seeds.len())];
        let mut bytes = seed.clone();
        mutate(&mut bytes, &mut dice);
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        let source = MemorySource::new("damaged", bytes.as_slice());
        match container.read_header(&source) {
            Ok(header) => {
                opened += 1;
                let inside = |end: u64| end <= bytes.len() as u64;
                assert!(
                    header
                        .entries
                        .iter()
                        .all(|e| e.bytes == 0 || inside(e.offset + e.bytes)),
                    "round {round}: an entry outside the file"
                );
            }
            Err(_) => refused += 1,
        }
        let memory = MEMORY.peak_usage().saturating_sub(before);
        assert!(
            memory < 1 << 20,
            "round {round}: {memory} bytes of memory for {} bytes",
            bytes.len()
        );
    }
    assert!(
        opened > 500 && refused > 10_000,
        "{opened} opened, {refused} refused"
    );
}
