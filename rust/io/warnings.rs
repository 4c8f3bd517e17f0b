//! Peculiarities of a file: told, but never more of them than a person reads.

/// Most warnings that are kept in words.
const MOST: usize = 20;

/// Warnings; beyond the first few only their number is kept.
#[derive(Debug, Default)]
pub(super) struct Warnings {
    told: Vec<String>,
    more: u64,
}

impl Warnings {
    /// Adds one; the text is made only if it is kept.
    pub fn add(&mut self, text: impl FnOnce() -> String) {
        if self.told.len() < MOST {
            self.told.push(text());
        } else {
            self.more += 1;
        }
    }

    /// The texts, and how many are left out.
    pub fn into_texts(mut self) -> Vec<String> {
        if self.more > 0 {
            self.told
                .push(format!("{} more warnings like these", self.more));
        }
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted() {
        let mut warnings = Warnings::default();
        for i in 0..1000 {
            warnings.add(|| i.to_string());
        }
        let texts = warnings.into_texts();
        assert_eq!(texts.len(), MOST + 1);
        assert_eq!(
            texts.last().map(String::as_str),
            Some("980 more warnings like these")
        );
    }
}
