(** * Eigenvalues of a complex matrix: trace, determinant, and Schur's inequality

    In words: over an algebraically closed field with complex conjugation, every n x n matrix [A] has a list [s] of
    eigenvalues ([spectrum_exists]) with these properties, gathered in the record [is_spectrum]:

    - [spectrum_poly]: the characteristic polynomial is the product of the [X - z], so that there are n of them
      ([spectrum_size]) and each has an eigenvector ([spectrum_eigen]);
    - [spectrum_trace]: the trace is their sum;
    - [spectrum_det]: [det (1 + A)] is the product of the [1 + z];
    - [schur]: the sum of the [|z|^2] is at most the squared Frobenius norm [tr (A A^H)] (Schur's inequality).

    The proof is by induction: a Householder reflection moves a unit eigenvector to the first coordinate, where the
    matrix becomes block triangular; reflections keep both the characteristic polynomial and the Frobenius norm. *)

From mathcomp Require Import all_ssreflect all_algebra.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** ** Characteristic polynomials *)

Section CharPoly.
Variable F : comRingType.

Lemma char_poly_block m n (A : 'M[F]_m) (C : 'M[F]_(n, m)) (B : 'M[F]_n) :
  char_poly (block_mx A 0 C B) = char_poly A * char_poly B.
Proof.
rewrite /char_poly /char_poly_mx scalar_mx_block map_block_mx opp_block_mx add_block_mx.
by rewrite map_mx0 subrr det_lblock.
Qed.

Lemma char_poly_similar n (U V A : 'M[F]_n) : U *m V = 1%:M ->
  char_poly (U *m A *m V) = char_poly A.
Proof.
move=> UV; have UVp : map_mx polyC U *m map_mx polyC V = 1%:M by rewrite -map_mxM UV map_mx1.
rewrite /char_poly; have -> : char_poly_mx (U *m A *m V) =
    map_mx polyC U *m char_poly_mx A *m map_mx polyC V.
  rewrite /char_poly_mx mulmxBr mulmxBl !map_mxM; congr (_ - _).
  by rewrite scalar_mxC -mulmxA UVp mulmx1.
by rewrite !det_mulmx mulrAC -det_mulmx UVp det1 mul1r.
Qed.

Lemma char_poly_mx11 (a : 'M[F]_1) : char_poly a = 'X - (a 0 0)%:P.
Proof. by rewrite /char_poly det_mx11 !mxE eqxx. Qed.

End CharPoly.

(** ** Conjugate transpose and Frobenius norm *)

Section Spectrum.
Variable C : numClosedFieldType.

Definition adj m n (A : 'M[C]_(m, n)) : 'M[C]_(n, m) := map_mx conjC A^T.

Lemma adjK m n (A : 'M[C]_(m, n)) : adj (adj A) = A.
Proof. by apply/matrixP => i j; rewrite !mxE conjCK. Qed.

Lemma adjM m n p (A : 'M[C]_(m, n)) (B : 'M[C]_(n, p)) : adj (A *m B) = adj B *m adj A.
Proof. by rewrite /adj trmx_mul map_mxM. Qed.

Lemma adjB m n (A B : 'M[C]_(m, n)) : adj (A - B) = adj A - adj B.
Proof. by apply/matrixP => i j; rewrite !mxE rmorphB. Qed.

Lemma adjZ m n (a : C) (A : 'M[C]_(m, n)) : adj (a *: A) = a^* *: adj A.
Proof. by apply/matrixP => i j; rewrite !mxE rmorphM. Qed.

Lemma adj1 n : adj 1%:M = 1%:M :> 'M[C]_n.
Proof. by rewrite /adj trmx1 map_mx1. Qed.

(** The squared Frobenius norm. *)
Definition fro2 m n (A : 'M[C]_(m, n)) : C := \tr (A *m adj A).

Lemma fro2E m n (A : 'M[C]_(m, n)) : fro2 A = \sum_i \sum_j `|A i j| ^+ 2.
Proof.
apply: eq_bigr => i _; rewrite mxE; apply: eq_bigr => j _.
by rewrite !mxE normCK.
Qed.

Lemma fro2_ge0 m n (A : 'M[C]_(m, n)) : 0 <= fro2 A.
Proof. by rewrite fro2E !sumr_ge0 // => i _; rewrite sumr_ge0 // => j _; rewrite exprn_ge0. Qed.

Lemma fro2_unitary n (U A : 'M[C]_n) : U *m adj U = 1%:M -> fro2 (U *m A *m adj U) = fro2 A.
Proof.
move=> U1; have U2 := mulmx1C U1.
rewrite /fro2 !adjM adjK !mulmxA -(mulmxA (U *m A)) U2 mulmx1.
by rewrite mxtrace_mulC !mulmxA U2 mul1mx.
Qed.

Lemma fro2_block m n (A : 'M[C]_m) (D : 'M[C]_(n, m)) (B : 'M[C]_n) :
  fro2 (block_mx A 0 D B) = fro2 A + fro2 D + fro2 B.
Proof.
have adj_block : adj (block_mx A 0 D B) = block_mx (adj A) (adj D) 0 (adj B).
  by rewrite /adj tr_block_mx map_block_mx trmx0 map_mx0.
by rewrite /fro2 adj_block mulmx_block mxtrace_block mul0mx addr0 mxtraceD addrA.
Qed.

(** ** A unitary matrix with a given first row *)

Lemma row_fro2 n (v : 'rV[C]_n) : v *m adj v = (fro2 v)%:M.
Proof. by apply/matrixP => i j; rewrite !ord1 !mxE eqxx mulr1n /fro2 /mxtrace big_ord1 mxE. Qed.

Lemma fro2_eq0 n (v : 'rV[C]_n) : fro2 v = 0 -> v = 0.
Proof.
rewrite fro2E big_ord1 => /psumr_eq0P v0; apply/rowP => j; rewrite mxE.
have /eqP := v0 (fun j _ => exprn_ge0 2 (normr_ge0 (v 0 j))) j isT.
by rewrite sqrf_eq0 normr_eq0 => /eqP.
Qed.

Lemma fro2Z m n (a : C) (A : 'M[C]_(m, n)) : fro2 (a *: A) = `|a| ^+ 2 * fro2 A.
Proof. by rewrite /fro2 adjZ -scalemxAl -scalemxAr scalerA mxtraceZ normCK. Qed.

(** A nonzero row can be scaled to a unit row whose first entry is real and not positive. *)
Lemma unit_row n (v : 'rV[C]_n.+1) : v != 0 ->
  exists2 c : C, c != 0 & fro2 (c *: v) = 1 /\ (c *: v) 0 0 <= 0.
Proof.
move=> v0; have N0 : 0 < fro2 v.
  by rewrite lt_neqAle fro2_ge0 andbT eq_sym; apply: contraNneq v0 => /fro2_eq0 ->.
pose p : C := if v 0 0 == 0 then 1 else - ((v 0 0)^* / `|v 0 0|).
have p1 : `|p| = 1.
  rewrite /p; case: eqP => [_ | /eqP v00]; first by rewrite normr1.
  by rewrite normrN normrM norm_conjC normfV normr_id divff ?normr_eq0.
have q0 : 0 < sqrtC (fro2 v) by rewrite sqrtC_gt0.
exists (p / sqrtC (fro2 v)).
  apply: mulf_neq0; first by rewrite -normr_eq0 p1 oner_neq0.
  by rewrite invr_eq0 gt_eqF.
split; first by rewrite fro2Z normrM p1 mul1r normfV gtr0_norm // exprVn sqrtCK mulVf ?gt_eqF.
rewrite mxE mulrAC mulr_le0_ge0 ?invr_ge0 ?(ltW q0) // /p; case: eqP => [-> | _].
  by rewrite mulr0.
by rewrite mulNr oppr_le0 mulrAC mulrC mulr_ge0 ?invr_ge0 // mulrC mul_conjC_ge0.
Qed.

(** The Householder reflection that exchanges [u] and the first coordinate vector. *)
Lemma householder n (u : 'rV[C]_n.+1) : fro2 u = 1 -> u 0 0 <= 0 ->
  exists2 U : 'M[C]_n.+1, U *m adj U = 1%:M & row 0 U = u.
Proof.
move=> u1 u00; pose e : 'rV[C]_n.+1 := delta_mx 0 0.
have u00_real : (u 0 0)^* = u 0 0 by apply/CrealP; rewrite ler0_real.
pose k := (1 - u 0 0)^-1; have k0 : k != 0.
  by rewrite invr_eq0 gt_eqF // subr_gt0 (le_lt_trans u00 ltr01).
have kE : 1 - u 0 0 = k^-1 by rewrite invrK.
have k_real : k^* = k by rewrite fmorphV rmorphB rmorph1 /= u00_real.
pose w := u - e; pose U := 1%:M - k *: (adj w *m w).
have adj_e : adj e = delta_mx 0 0 by rewrite /adj trmx_delta map_delta_mx.
have ue : u *m adj e = (u 0 0)%:M.
  by rewrite adj_e -colE; apply/matrixP => i j; rewrite !ord1 !mxE eqxx mulr1n.
have eu : e *m adj u = (u 0 0)%:M.
  by rewrite -[e]adjK -adjM ue /adj tr_scalar_mx map_scalar_mx u00_real.
have ee : e *m adj e = 1%:M.
  by rewrite adj_e mul_delta_mx; apply/matrixP => i j; rewrite !ord1 !mxE eqxx.
have ww : w *m adj w = (2%:R * k^-1)%:M.
  rewrite /w adjB mulmxBl !mulmxBr ue eu ee row_fro2 u1 -kE.
  by apply/matrixP => i j; rewrite !ord1 !mxE eqxx !mulr1n opprB mulr_natl mulr2n.
have ew : e *m adj w = (- k^-1)%:M.
  rewrite /w adjB mulmxBr eu ee -kE.
  by apply/matrixP => i j; rewrite !ord1 !mxE eqxx !mulr1n opprB.
exists U; last first.
  rewrite rowE -/e mulmxBr mulmx1 -scalemxAr mulmxA ew mul_scalar_mx scalerA.
  by rewrite mulrN mulfV // scaleN1r opprK addrC subrK.
have -> : adj U = U by rewrite adjB adj1 adjZ k_real adjM adjK.
have WW : (adj w *m w) *m (adj w *m w) = (2%:R * k^-1) *: (adj w *m w).
  by rewrite mulmxA -(mulmxA (adj w)) ww scalar_mxC mul_scalar_mx -scalemxAl.
rewrite /U; set W := adj w *m w in WW *.
rewrite mulmxBl !mulmxBr !mul1mx !mulmx1 -!scalemxAl -!scalemxAr WW !scalerA.
by rewrite mulrCA mulfK // mulr_natl mulr2n scalerDl opprB addrK subrK.
Qed.

(** ** The eigenvalues *)

(** [s] lists the eigenvalues of [A] with their algebraic multiplicities. *)
Record is_spectrum n (A : 'M[C]_n) (s : seq C) : Prop := IsSpectrum {
  spectrum_poly : char_poly A = \prod_(z <- s) ('X - z%:P);
  spectrum_trace : \tr A = \sum_(z <- s) z;
  spectrum_det : \det (1%:M + A) = \prod_(z <- s) (1 + z);
  schur : \sum_(z <- s) `|z| ^+ 2 <= fro2 A }.

Theorem spectrum_exists n (A : 'M[C]_n) : exists s, is_spectrum A s.
Proof.
elim: n => [|n ih] in A *.
  exists [::]; split; rewrite !big_nil ?fro2_ge0 ?det_mx00 //.
  - by rewrite /char_poly det_mx00.
  - by rewrite /mxtrace big_ord0.
have /closed_rootP[lambda] : size (char_poly A) != 1%N by rewrite size_char_poly.
rewrite -eigenvalue_root_char => /eigenvalueP[v vA v0].
have [c c0 [u1 u00]] := unit_row v0.
have [U U1 Uv] := householder u1 u00.
have [B defB] : exists B, B = U *m A *m adj U by exists (U *m A *m adj U).
have B0 : row 0 B = lambda *: delta_mx 0 0.
  rewrite defB !row_mul Uv -scalemxAl vA scalerA mulrC -scalerA.
  by rewrite -scalemxAl -Uv -row_mul U1 row1.
pose lam : 'M[C]_1 := lambda%:M.
have [D [A' BE]] : exists D, exists A', B = block_mx lam 0 D A' :> 'M_(1 + n).
  exists (dlsubmx (B : 'M_(1 + n))), (drsubmx (B : 'M_(1 + n))).
  have B0j j : B 0 j = lambda *+ (j == 0).
    by have /rowP/(_ j) := B0; rewrite !mxE eqxx mulr_natr.
  have first : lshift n (0 : 'I_1) = 0 :> 'I_(1 + n) by apply: val_inj.
  rewrite -[LHS](@submxK _ 1 n 1 n); congr block_mx; apply/matrixP => i j.
    by rewrite !mxE !ord1 first B0j !eqxx.
  by rewrite !mxE !ord1 first B0j.
have [s [s_poly s_tr s_det s_schur]] := ih A'.
exists (lambda :: s); split; rewrite big_cons.
- rewrite -(char_poly_similar A U1) -defB BE.
  by rewrite [LHS](@char_poly_block _ 1 n lam D A') char_poly_mx11 mxE s_poly.
- rewrite -[A]mulmx1 -(mulmx1C U1) mulmxA mxtrace_mulC mulmxA -defB BE.
  by rewrite [LHS](@mxtrace_block _ 1 n lam 0 D A') mxtrace_scalar s_tr.
- have -> : \det (1%:M + A) = \det (1%:M + B).
    have -> : 1%:M + B = U *m (1%:M + A) *m adj U by rewrite mulmxDr mulmx1 mulmxDl U1 defB.
    by rewrite !det_mulmx mulrAC -det_mulmx U1 det1 mul1r.
  have -> : 1%:M + B = block_mx (1%:M + lam) 0 D (1%:M + A') :> 'M_(1 + n).
    rewrite BE; apply: (etrans (congr1 (+%R^~ _) (@scalar_mx_block _ 1 n 1))).
    by rewrite [LHS](@add_block_mx _ 1 n 1 n) !add0r.
  by rewrite [LHS](@det_lblock _ 1 n) det_mx11 !mxE eqxx s_det.
- rewrite -(fro2_unitary A U1) -defB BE [fro2 _](@fro2_block 1 n lam D A') ler_add //.
  rewrite -[leLHS]addr0 ler_add ?fro2_ge0 //.
  by rewrite fro2E !big_ord1 mxE eqxx mulr1n.
Qed.

Section SpectrumTheory.
Variables (n : nat) (A : 'M[C]_n) (s : seq C).
Hypothesis As : is_spectrum A s.

Lemma spectrum_size : size s = n.
Proof.
apply: succn_inj; rewrite -(size_char_poly A) (spectrum_poly As).
by rewrite (size_prod_XsubC s id).
Qed.

Lemma spectrum_eigen z : z \in s -> exists2 v : 'rV[C]_n, v *m A = z *: v & v != 0.
Proof.
move=> zs; apply/eigenvalueP; rewrite eigenvalue_root_char (spectrum_poly As).
by rewrite root_prod_XsubC.
Qed.

End SpectrumTheory.

End Spectrum.
