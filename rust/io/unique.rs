//! Names that appear twice.

/// The first (in sorted order) name that two of `items` share. Takes one index per item, not a
/// second copy of the names.
pub(super) fn first_double<T>(items: &[T], name: impl Fn(&T) -> &str) -> Option<&str> {
    let mut sorted: Vec<&str> = items.iter().map(name).collect();
    sorted.sort_unstable();
    sorted
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if a == b))
        .and_then(|pair| pair.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_double() {
        assert_eq!(first_double(&["b", "a", "c"], |name| name), None);
        assert_eq!(first_double(&["b", "a", "b"], |name| name), Some("b"));
        assert_eq!(first_double::<&str>(&[], |name| name), None);
    }
}
