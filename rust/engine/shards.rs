//! Which tensors share a weights file.
//!
//! The rule is that of huggingface_hub 2.4 (`split_state_dict_into_shards_factory`), so that a model
//! has the same files whoever writes it: tensors fill a file in their order until the next one does
//! not fit; one that is larger than a file may be gets its own, at once, and the file begun before
//! it goes on behind it.

/// Positions of the units in each file, in file order. `sizes` are the data bytes of each unit,
/// `most` those of one file at most; `None` is one file. There is at least one, if an empty one.
pub fn split(sizes: &[u64], most: Option<u64>) -> Vec<Vec<usize>> {
    let Some(most) = most else {
        return vec![(0..sizes.len()).collect()];
    };
    let mut files = Vec::new();
    let mut open = Vec::new();
    let mut open_bytes = 0u64;
    for (unit, &bytes) in sizes.iter().enumerate() {
        if bytes > most {
            files.push(vec![unit]);
            continue;
        }
        if open_bytes.saturating_add(bytes) > most {
            files.push(std::mem::take(&mut open));
            open_bytes = 0;
        }
        open.push(unit);
        open_bytes = open_bytes.saturating_add(bytes);
    }
    if !open.is_empty() || files.is_empty() {
        files.push(open);
    }
    files
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn files_are_filled_in_order_and_large_tensors_go_alone() {
        assert_eq!(split(&[], Some(3)), [[0usize; 0]]);
        assert_eq!(split(&[1, 2, 3], None), [[0, 1, 2]]);
        assert_eq!(split(&[1, 2, 3], Some(3)), [vec![0, 1], vec![2]]);
        assert_eq!(split(&[4, 5], Some(3)), [[0], [1]]);
        // The file that was open when the large tensor came is numbered behind it.
        assert_eq!(
            split(&[1, 9, 1, 2], Some(3)),
            [vec![1], vec![0, 2], vec![3]]
        );
        assert_eq!(split(&[0, 0, 1], Some(0)), [vec![2], vec![0, 1]]);
    }
}
