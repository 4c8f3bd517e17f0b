//! What a numeric layout does: sizes, encoding and decoding, tile by tile.

use super::quanto_groups::MAX_LANES;
use super::{Fold, Info, Layout, NonFinite, Params, Parts, PartsMut, Weights};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// A numeric layout. Object-safe; implementations hold no state.
pub trait Format: Sync + Send {
    /// This format's row in the table.
    fn info(&self) -> &'static Info;

    /// Components, sizes and tile unit for a tensor of `shape`. Pure arithmetic; refuses shapes
    /// and parameters the format cannot take.
    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout>;

    /// The layout by which a tensor of `layout` is encoded. It is another one than that of decoding where
    /// weights that are far apart share bytes: those come together, in the order of [`Format::fold`].
    /// Names, types and shapes of the arrays are the same.
    fn encoding(&self, layout: &Layout) -> Result<Layout> {
        Ok(layout.clone())
    }

    /// The order in which tiles take the weights of a tensor that is encoded, `layout` being that of
    /// [`Format::encoding`] or of decoding; `None` where that is the order in memory. Indices of weights in
    /// [`Format::measure`], [`Format::encode`] and [`Format::decode_encoded`] are those of this order.
    fn fold(&self, _layout: &Layout) -> Option<Fold> {
        None
    }

    /// First pass of formats with [`Layout::statistics`]: writes what the tile contributes.
    fn measure(
        &self,
        _layout: &Layout,
        _first: u64,
        _weights: Weights<'_>,
        _statistics: &mut [u8],
    ) -> Result<()> {
        Ok(())
    }

    /// Whether a tile is encoded by its own statistics, those of others being needed for
    /// [`Format::whole`] only. There is one pass then, of [`Format::encode_at_once`], and [`Format::encode`] and
    /// [`Format::decode_encoded`] are given the statistics of the tile.
    fn measures_at_once(&self) -> bool {
        false
    }

    /// Measures a tile and encodes it. Formats that do both in one loop leave out the others.
    fn encode_at_once(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        self.measure(layout, first, weights, statistics)?;
        self.encode(layout, first, weights, statistics, parts)
    }

    /// As [`Format::encode_at_once`], for a tile of the order of [`Format::fold`] whose weights are given as they
    /// lie in memory: lane p has the rows of part p. `None` where that is not done; what is wrong with weights is
    /// told by the other one.
    fn encode_lanes(
        &self,
        _layout: &Layout,
        _lanes: [Weights<'_>; MAX_LANES],
        _statistics: &mut [u8],
        _parts: &mut PartsMut<'_>,
    ) -> Option<Result<()>> {
        None
    }

    /// Between the passes: turns the statistics of the whole tensor into what `encode` needs, and
    /// records tensor-wide parameters in the layout.
    fn settle(&self, _layout: &mut Layout, _statistics: &mut [u8]) -> Result<()> {
        Ok(())
    }

    /// For tensors that get one scale together: takes the statistics of one of them into `joined`, which
    /// [`Format::settle`] and [`Format::encode`] are given for each of them, once it holds all. Fails for
    /// formats without such a scale.
    fn join(&self, _joined: &mut Vec<u8>, _statistics: &[u8]) -> Result<()> {
        Err(Error::config(format!(
            "{}: has no scale that tensors share",
            self.info().name
        )))
    }

    /// The error of formats that find weights that are not finite; the engine, which knows where they are, has
    /// a better one.
    fn not_finite(&self) -> Error {
        let name = self.info().name;
        Error::format(format!("{name}: weights are not finite"))
    }

    /// Fails if tensors cannot be encoded with these parameters, whatever their shape.
    fn check_encodes(&self, params: &Params) -> Result<()> {
        self.info().check_encodes(params)
    }

    /// Encodes the tile that begins at weight `first` into its part of each sliced component.
    /// `statistics` is the whole tensor's (empty for formats without). The weights are finite
    /// unless the caller chose to keep non-finite ones. Formats that are only decoded leave it out.
    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        _weights: Weights<'_>,
        _statistics: &[u8],
        _parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        self.check_encodes(&layout.params)?;
        let name = self.info().name;
        Err(Error::Internal(format!("{name} has no encoder")))
    }

    /// Decodes the tile that begins at weight `first`.
    fn decode(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()>;

    /// As [`Format::decode`], for a tile that was just encoded: in its order, with the same statistics.
    fn decode_encoded(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        _statistics: &[u8],
        weights: &mut [f32],
    ) -> Result<()> {
        self.decode(layout, first, parts, weights)
    }

    /// Weights at multiples of which, counted from the start of a unit, a tile to decode may begin and end as
    /// long as it stays in that unit.
    fn decode_step(&self, layout: &Layout) -> u64 {
        layout.unit_weights
    }

    /// Bytes of each whole-tensor component, by component index, after encoding.
    fn whole(&self, _layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        Ok(Vec::new())
    }

    /// The whole-tensor component that holds one `f32`, [`Params::tensor_scale`]; whoever has the stored
    /// arrays reads it before anything is decoded.
    fn tensor_scale(&self) -> Option<usize> {
        None
    }

    /// Whether an importance vector changes what is encoded.
    fn weighs(&self) -> bool {
        false
    }

    /// Whether a 64-bit source must be narrowed to `f32` by rounding to odd, because this format
    /// rounds once more to 16 bits (so that the two roundings equal one).
    fn rounds_to_16_bits(&self) -> bool {
        false
    }

    /// As [`Format::decode`], but a 64-bit weight is narrowed by rounding to odd, so that one more
    /// rounding to 16 bits gives the correctly rounded result. Differs for `f64` only.
    fn decode_to_odd(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        self.decode(layout, first, parts, weights)
    }

    /// Bytes of what is moved as one (a word, a block) in a component that files hold with rows and columns
    /// exchanged; `None` for all others. Tiles have their bytes in the order of the rows.
    fn transposed_element(&self, _layout: &Layout, _component: usize) -> Option<u64> {
        None
    }

    /// Whether [`Format::measure`] and [`Format::encode`] take weights of 16 bits as they are stored, if they
    /// are finite. Others are given `f32` only.
    fn takes_stored(&self) -> bool {
        false
    }

    /// The type of weights that are stored as they are, one after the other.
    fn plain(&self) -> Option<Dtype> {
        None
    }

    /// Whether [`Format::measure`] fails for weights that are not finite, or [`Format::encode`] where there is
    /// one pass, so that nobody has to look for them first. It is cheap where a largest magnitude is at hand.
    fn finds_nonfinite(&self) -> bool {
        false
    }

    /// What happens to weights that are not finite.
    fn nonfinite(&self) -> NonFinite {
        NonFinite::Refused
    }
}
